"""The loop both trainers run: limits, learning from where a run stopped, log, progress bar, signals.

All randomness of a step is a function of (seed, step), so a resumed run takes the very steps an uninterrupted one
would have taken, and no generator state has to be stored.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from var_fast.errors import UserError
from var_fast.training.files import contents_of, load_state, save_state
from var_fast.training.schedule import Limits


class Job(Protocol):
    """What the loop trains."""

    kind: str  # "tokenizer" or "transformer"
    settings: Any  # a dataclass; a resumed run must have the same, but for fields with compare=False
    images_per_step: int

    def step(self, step: int, progress: float) -> dict[str, torch.Tensor]: ...  # has "loss"
    def evaluate(self) -> dict[str, Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Cadence:
    """How often the loop saves, evaluates and logs. Seconds are wall clock, 0 means never."""

    save_every_s: float = 300.0
    save_every_steps: int = 1000
    eval_every_s: float = 300.0
    log_every_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("save_every_s", "save_every_steps", "eval_every_s"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        if not self.log_every_steps >= 1:
            raise UserError(f"log_every_steps: got {self.log_every_steps}, expected 1 or more")


@dataclass(frozen=True)
class Outcome:
    """How a run ended. finished: a limit was reached; otherwise a signal stopped it, and it can be resumed."""

    finished: bool
    step: int
    elapsed_s: float
    metrics: dict[str, Any]


def step_seed(seed: int, step: int) -> int:
    """One 63-bit seed per (seed, step), well mixed (the finaliser of splitmix64)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def batch_indices(count: int, batch: int, step: int, seed: int) -> torch.Tensor:
    """(batch,) int64: which of `count` examples step number `step` takes; every epoch is a fresh permutation."""
    position = torch.arange(step * batch, (step + 1) * batch)
    epoch, place = position // count, position % count
    out = torch.empty(batch, dtype=torch.int64)
    for e in epoch.unique().tolist():
        order = torch.randperm(count, generator=torch.Generator().manual_seed(step_seed(seed, -2 - e)))
        out[epoch == e] = order[place[epoch == e]]
    return out


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying of the first; the second one acts as usual."""
    caught: list[int] = []
    before = {}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _resume(job: Job, path: Path) -> tuple[int, float, dict[str, Any]]:
    """Load `path` into the job; returns (step, elapsed seconds, last metrics)."""
    state = load_state(path, job.kind)
    with contents_of(path):
        theirs = state["settings"]
        for name in (field.name for field in fields(job.settings) if field.compare):
            ours = getattr(job.settings, name)
            if _plain(ours) != _plain(theirs.get(name)):
                raise UserError(
                    f"{name}: got {ours!r}, but {path} was trained with {theirs.get(name)!r}; "
                    "use that value, another output folder, or --restart"
                )
        job.load_state_dict(state["job"])
        return state["step"], state["elapsed_s"], state["metrics"]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def run_loop(
    job: Job,
    out: str | Path,
    limits: Limits,
    *,
    cadence: Cadence | None = None,
    restart: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Train `job` until a limit or a signal, in folder `out` (checkpoint.pt, log.jsonl).

    Continues from out/checkpoint.pt if there is one, unless `restart`. Raises UserError if the loss stops being
    finite (nothing is saved then), if the checkpoint there was made with other settings, or if a file cannot be
    written.
    """
    cadence = cadence or Cadence()
    console = console or Console()
    out = Path(out)
    path = out / "checkpoint.pt"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if restart:  # or, killed before its first save, the run would go on as the old one
            for old in (path, out / "best.pt"):
                old.unlink(missing_ok=True)
        # Unbuffered: nothing is left to write, and to fail, when it is closed.
        log = open(out / "log.jsonl", "wb" if restart else "ab", buffering=0)
    except OSError as error:
        raise UserError(f"out: cannot write in {out}: {error.strerror}") from None
    step, before_s, metrics = 0, 0.0, {}
    if path.exists():
        step, before_s, metrics = _resume(job, path)
        console.print(
            f"resuming {path} at step {step}, {before_s / 60:.1f} minutes in", soft_wrap=True, highlight=False
        )

    started = time.monotonic()
    saved_at = evaluated_at = logged_at = started
    window: list[dict[str, torch.Tensor]] = []

    def elapsed() -> float:
        return before_s + time.monotonic() - started

    def record(kind: str, values: dict[str, Any]) -> None:
        line = json.dumps({"kind": kind, "step": step, "elapsed_s": round(elapsed(), 1), **values}) + "\n"
        try:
            log.write(line.encode())
        except OSError as error:
            raise UserError(
                f"cannot write {log.name}: {error.strerror}; what was saved in {path} before is intact"
            ) from error

    def flush_window(now: float) -> dict[str, float]:
        """Mean of the steps since the last call, logged; raises if the loss is no number any more."""
        nonlocal logged_at
        if not window:
            return {}
        means = {k: float(torch.stack([torch.as_tensor(w[k]).float() for w in window]).mean()) for k in window[0]}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(means.get(name, 0.0)):
                raise UserError(
                    f"{name} became {means[name]} before step {step}; {path} holds the last good state: try a lower lr"
                )
        means["images_per_s"] = round(len(window) * job.images_per_step / max(1e-9, now - logged_at), 2)
        record("train", means)
        window.clear()
        logged_at = now
        return means

    def evaluate() -> None:
        nonlocal metrics
        metrics = job.evaluate()
        record("eval", metrics)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float))
        console.print(f"step {step}, {elapsed() / 60:.1f} min: {shown}", soft_wrap=True, highlight=False)

    def save() -> None:
        state = {"kind": job.kind, "settings": asdict(job.settings), "step": step, "elapsed_s": elapsed()}
        save_state(path, {**state, "metrics": metrics, "job": job.state_dict()})

    columns = (
        TextColumn(job.kind),
        BarColumn(),
        TextColumn("{task.percentage:5.1f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    finished = False
    with log, stop_signals() as caught, Progress(*columns, console=console) as bar:
        task = bar.add_task(job.kind, total=1.0, note="")
        while True:
            progress = limits.progress(step, elapsed())
            if progress >= 1.0:
                finished = True
                break
            if caught:
                break
            torch.manual_seed(step_seed(job.settings.seed, step))
            window.append(job.step(step, progress))
            step += 1
            now = time.monotonic()
            if step % cadence.log_every_steps == 0:
                means = flush_window(now)
                now_progress = limits.progress(step, elapsed())
                left_s = elapsed() * (1 - now_progress) / max(1e-9, now_progress)
                facts = " ".join(f"{k} {v:.4g}" for k, v in means.items())
                bar.update(task, completed=now_progress, note=f"step {step} {facts}, {left_s / 60:.0f} min left")
            if cadence.eval_every_s and now - evaluated_at >= cadence.eval_every_s:
                evaluate()
                evaluated_at = time.monotonic()
            due = cadence.save_every_s and now - saved_at >= cadence.save_every_s
            if due or (cadence.save_every_steps and step % cadence.save_every_steps == 0):
                flush_window(time.monotonic())
                save()
                saved_at = time.monotonic()
        flush_window(time.monotonic())
        if finished:
            evaluate()
        save()
        bar.update(task, completed=limits.progress(step, elapsed()))
    if not finished:
        console.print(
            f"stopped by a signal at step {step}; the same command goes on from {path}", soft_wrap=True, highlight=False
        )
    return Outcome(finished, step, elapsed(), metrics)
