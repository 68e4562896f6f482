"""The loop both trainers run: limits, learning from where a run stopped, log, progress bar, signals, failures.

All randomness of a step is a function of (seed, step), so a resumed run takes the very steps an uninterrupted one
would have taken, and no generator state has to be stored.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from var_fast.errors import UserError
from var_fast.training.files import contents_of, replace_folder, save_state, write_atomic, write_json
from var_fast.training.logs import LOG, RunLog
from var_fast.training.order import step_seed
from var_fast.training.ranks import Ranks
from var_fast.training.run_checkpoints import RunCheckpoints, resolve
from var_fast.training.schedule import Limits
from var_fast.training.settings import differences

SKIPPED = "skipped.txt"  # in a run's folder


class Job(Protocol):
    """What the loop trains. On several ranks all of them call every method, in one order."""

    kind: str  # "tokenizer" or "transformer"
    settings: Any  # a dataclass; a resumed run must have the same, but for fields with compare=False
    ranks: Ranks
    images_per_step: int  # of all ranks
    skipped: set[str]  # names of the pictures that this rank could not read

    def start(self) -> None:
        """What a run needs before its first step, and a resumed one has already."""

    def batches(self, first_step: int) -> Iterator[Any]:
        """This rank's batch of every step from there on."""

    def step(self, step: int, progress: float, batch: Any) -> dict[str, torch.Tensor]:
        """Numbers () or (K,) on the device, means over this rank's images, among them loss and grad_norm. The host
        does not wait for them."""

    def evaluate(self) -> dict[str, Any]:
        """Numbers and lists of numbers about held-out pictures, the same on every rank."""

    def badness(self, metrics: dict[str, Any]) -> float | None:
        """Of what evaluate() gave: the lower, the better; None where it does not tell."""

    def tensors(self) -> dict[str, Any]:
        """Everything to go on from, in nested dicts: the very tensors in use, which loading fills."""

    def facts(self) -> dict[str, Any]:
        """The rest of it, in JSON's types."""

    def set_facts(self, facts: dict[str, Any]) -> None: ...

    def draw_samples(self, path: Path, step: int) -> None:
        """Writes a picture that shows how far it is."""

    def model_writer(self) -> Callable[[Path], None] | None:
        """On the main rank what fills a folder with the averaged weights, for load_checkpoint; None on the others."""

    def batch_for_study(self, batch: Any) -> dict[str, Any]:
        """The tensors of a batch that went wrong, to be saved."""


@dataclass(frozen=True)
class Cadence:
    """How often the loop does what besides training. Seconds are wall clock; 0 means never."""

    save_every_s: float = 300.0
    save_every_steps: int = 1000
    eval_every_steps: int = 1000
    sample_every_steps: int = 1000
    log_every_steps: int = 20
    keep: int = 3  # checkpoints, besides the best; 0: all
    diverged_at: float = 4.0  # the loss is lost if its running mean is so many times the lowest one

    def __post_init__(self) -> None:
        for name in ("save_every_s", "save_every_steps", "eval_every_steps", "sample_every_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        if not self.log_every_steps >= 1:
            raise UserError(f"log_every_steps: got {self.log_every_steps}, expected 1 or more")
        if self.keep < 0:
            raise UserError(f"keep: got {self.keep}, expected 0 or more")


@dataclass(frozen=True)
class Outcome:
    """How a run ended. finished: a limit was reached; otherwise a signal stopped it, and it can be resumed."""

    finished: bool
    step: int
    elapsed_s: float
    metrics: dict[str, Any]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying of them; a second Ctrl-C acts as usual.

    A second SIGTERM does not: a cluster sends one to every process, and torchrun passes its own on.
    """
    caught: list[int] = []
    before = {}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_loop(
    job: Job,
    out: str | Path,
    limits: Limits,
    *,
    cadence: Cadence | None = None,
    resume: str | Path = "auto",
    tensorboard: bool = True,
    wandb: str | None = None,
    console: Console | None = None,
) -> Outcome:
    """Train `job` until a limit or a signal, in folder `out`.

    resume: "auto" goes on from the newest checkpoint in `out`, if there is one; "never" begins anew and removes the run
    that is there; else a run or a checkpoint with the same settings, to go on from where `out` has none yet. Leaves
    out/log.jsonl, settings.json, tensorboard/, checkpoints/, samples/, model/ (averaged weights at the end), best/
    (those of the best evaluation), skipped.txt (pictures that could not be read). Raises UserError if the loss is no
    number any more or has diverged (bad-batch-*.pt holds the batch; the last checkpoint is from before), if the
    checkpoint there was made with other settings, or if a file cannot be written.
    """
    with stop_signals() as caught:
        run = _Run(job, Path(out), limits, cadence or Cadence(), console or Console())
        run.begin(resume, tensorboard, wandb)
        try:
            return run.train(caught)
        finally:
            run.close()


@dataclass
class _Window:
    """The numbers of the steps since the last line of the log; means over ranks once they are settled."""

    ranks: Ranks
    settled: dict[str, list[Any]] = field(default_factory=dict)
    fresh: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def settle(self) -> dict[str, list[Any]]:
        """All steps' numbers, as Python's; None for those that a step has not. Waits for the device."""
        if self.fresh:
            for name in self.fresh[0]:
                stacked = torch.stack([values[name].detach().float() for values in self.fresh])
                self.settled.setdefault(name, []).extend(_without_nan(self.ranks.mean_(stacked).tolist()))
            self.fresh = []
        return self.settled

    def means(self) -> dict[str, Any]:
        """Of every number, and the window begins anew."""
        means = {name: _mean(values) for name, values in self.settle().items()}
        self.settled = {}
        return means


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "surrogateescape")


def _printable(name: str) -> str:
    """A file's name, of which any byte may be a part."""
    return name.encode("utf-8", "replace").decode()


def _mean(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [_mean(list(column)) for column in zip(*values)]
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def _without_nan(value: Any) -> Any:
    """NaN is no JSON."""
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if math.isnan(value) else value


class _Run:
    """One run in the process that trains it."""

    def __init__(self, job: Job, out: Path, limits: Limits, cadence: Cadence, console: Console) -> None:
        self.job, self.out, self.limits, self.cadence = job, out, limits, cadence
        self.ranks, self.is_main = job.ranks, job.ranks.is_main
        self.console = console if self.is_main else Console(quiet=True)
        self.step, self.before_s, self.metrics = 0, 0.0, {}
        self.best = math.inf
        self.evaluated_step = self.drawn_step = self.saved_step = -1
        self.window = _Window(self.ranks)
        self.watch = _LossWatch(cadence.diverged_at)
        self.known_skipped: set[str] = set()
        self.log: RunLog | None = None
        self.checkpoints: RunCheckpoints | None = None

    def say(self, words: str) -> None:
        self.console.print(words, soft_wrap=True, highlight=False, markup=False)

    # ------------------------------------------------------------------------------------------------- beginning
    def begin(self, resume: str | Path, tensorboard: bool, wandb: str | None) -> None:
        """Opens folder, checkpoints and log, and goes on from a checkpoint or starts."""
        with self.ranks.together():
            if self.is_main:
                self._make_folder(anew=resume == "never")
        self.checkpoints = RunCheckpoints(self.out / "checkpoints", self.ranks, self.cadence.keep)
        self.again = "the same command without --restart" if resume == "never" else "the same command"
        place = None if resume == "never" else self.checkpoints.latest()
        if resume not in ("auto", "never"):
            wanted = resolve(resume)
            if place is not None and wanted.resolve().parent == place.resolve().parent and wanted.name != place.name:
                raise UserError(
                    f"resume: {wanted} is older than {place} in the same run, expected another --out for it"
                )
            place = place or wanted
        if place is None:
            self.job.start()
        else:
            self._load(place)
        with self.ranks.together():
            if self.is_main:
                write_json(self.out / "settings.json", {"kind": self.job.kind, **asdict(self.job.settings)})
                self.log = RunLog(self.out, self.step, tensorboard=tensorboard, wandb=wandb)
        if place is not None:
            self.say(f"resuming {place} at step {self.step}, {self.before_s / 60:.1f} minutes in")

    def _make_folder(self, anew: bool) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if not anew:
                return
            ours = [self.out / name for name in (LOG, "settings.json", SKIPPED)]
            if not any(path.exists() for path in ours):
                return
            # The checkpoints first: killed here, or before its first save, the run must not go on as the old one.
            for name in ("checkpoints", "best", "model", "samples", "tensorboard"):
                if (self.out / name).exists():
                    shutil.rmtree(self.out / name)
            for path in ours:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"out: cannot write in {self.out}: {error.strerror}") from None

    def _load(self, place: Path) -> None:
        facts = self.checkpoints.facts(place)
        with contents_of(place):
            if facts["kind"] != self.job.kind:
                raise UserError(f"resume: {place} is of a {facts['kind']}, expected one of a {self.job.kind}")
            for name, ours, theirs in differences(self.job.settings, facts["settings"]):
                raise UserError(
                    f"{name}: got {ours!r}, but {place} was trained with {theirs!r}; "
                    "use that value, another output folder, or --restart"
                )
            self.job.set_facts(facts["job"])
            self.step, self.before_s, self.metrics = facts["step"], facts["elapsed_s"], facts["metrics"]
            self.best = math.inf if facts["best"] is None else facts["best"]
            self.window.settled = facts["window"]
            self.watch.set_facts(facts["watch"])
            self.evaluated_step = facts["evaluated_step"]
        self.checkpoints.load(place, self.job.tensors())
        if (self.out / SKIPPED).exists():
            self.known_skipped = set(_text(self.out / SKIPPED).splitlines())

    # -------------------------------------------------------------------------------------------------- training
    def train(self, caught: list[int]) -> Outcome:
        """Steps until the end, with everything that falls due between them."""
        self.started = self.saved_at = self.logged_at = time.monotonic()
        self.logged_step = self.step
        batches = None
        finished = False
        with self._bar() as show:
            while True:
                progress, stop, save_due = self._agree(caught)
                if progress >= 1.0:
                    finished = True
                    break
                if stop:
                    break
                if batches is None:
                    batches = self.job.batches(self.step)
                batch = next(batches)
                torch.manual_seed(step_seed(self.job.settings.seed, self.step) ^ (self.ranks.rank * 0x9E3779B9))
                values = self.job.step(self.step, progress, batch)
                self.window.fresh.append(values)
                # One step late: then the device has work to do while the host looks at the numbers.
                self.watch.look(self.step, values, self.job.batch_for_study(batch), self._failed)
                self.step += 1
                self._fall_due(show, save_due)
            self.watch.settle(self._failed)
            show(self.progress(), "")
        best = finished and self.evaluated_step != self.step and self.evaluate()
        if finished and self.drawn_step != self.step:
            self.draw_samples()
        self.save(best=best, wait=True)
        self._write_model(self.out / "model")
        if finished:
            self.say(f"done: {self.step} steps in {self.elapsed() / 60:.1f} min; the model is {self.out / 'model'}")
        else:
            self.say(f"stopped by a signal at step {self.step}; {self.again} goes on from {self.checkpoints.latest()}")
        return Outcome(finished, self.step, self.elapsed(), self.metrics)

    def elapsed(self) -> float:
        """Seconds of training, resumed parts together."""
        return self.before_s + time.monotonic() - self.started

    def progress(self) -> float:
        return self.limits.progress(self.step, self.elapsed())

    def _agree(self, caught: list[int]) -> tuple[float, bool, bool]:
        """(progress, whether to stop, whether to save) as all ranks see it: clocks and signals differ."""
        every_s = self.cadence.save_every_s
        save_due = every_s > 0 and time.monotonic() - self.saved_at >= every_s
        own = [self.progress(), float(bool(caught)), float(save_due)]
        if self.ranks.count > 1:
            agreed = torch.tensor(own, dtype=torch.float64)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.ranks.control)
            own = agreed.tolist()
        return own[0], own[1] > 0, own[2] > 0

    def _fall_due(self, show, save_due: bool) -> None:
        c, step = self.cadence, self.step
        if step % c.log_every_steps == 0:
            means = self._write_window()
            left = self.elapsed() * (1 - self.progress()) / max(1e-9, self.progress())
            facts = " ".join(f"{k} {v:.4g}" for k, v in means.items() if isinstance(v, float))
            show(self.progress(), f"step {step} {facts}, {left / 60:.0f} min left")
        if c.eval_every_steps and step % c.eval_every_steps == 0:
            if self.evaluate():
                self.save(best=True)
        if c.sample_every_steps and step % c.sample_every_steps == 0:
            self.draw_samples()
        if (save_due or (c.save_every_steps and step % c.save_every_steps == 0)) and self.saved_step != step:
            self.save()

    def _write_window(self) -> dict[str, Any]:
        self.watch.settle(self._failed)
        means = self.window.means()
        now = time.monotonic()
        rate = (self.step - self.logged_step) * self.job.images_per_step / max(1e-9, now - self.logged_at)
        means["images_per_s"] = round(rate, 2)
        self.logged_at, self.logged_step = now, self.step
        self._note_skipped()
        if self.log is not None:
            self.log.write("train", self.step, {"elapsed_s": round(self.elapsed(), 1), **means})
        return means

    def _note_skipped(self) -> None:
        """Names of unreadable pictures go into a file, and their number is said whenever it has grown."""
        names = set().union(*self.ranks.gather(self.job.skipped))
        if names <= self.known_skipped:
            return
        self.known_skipped |= names
        if self.is_main:
            lines = "".join(f"{name}\n" for name in sorted(self.known_skipped))
            write_atomic(self.out / SKIPPED, lambda part: part.write_bytes(lines.encode("utf-8", "surrogateescape")))
            self.say(
                f"{len(self.known_skipped)} pictures cannot be read and are skipped: {self.out / SKIPPED} "
                f"names them, the last one is {_printable(sorted(names)[-1])}"
            )

    # ------------------------------------------------------------------------------------------ what falls due
    def evaluate(self) -> bool:
        """Held-out numbers into the log; whether they are the best so far."""
        metrics = self.job.evaluate()
        self.evaluated_step = self.step
        if not metrics:
            return False
        self.metrics = metrics
        if self.log is not None:
            self.log.write("eval", self.step, {"elapsed_s": round(self.elapsed(), 1), **metrics})
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float))
        self.say(f"step {self.step}, {self.elapsed() / 60:.1f} min: {shown}")
        badness = self.job.badness(metrics)
        if badness is None or not badness < self.best:
            return False
        self.best = badness
        self._write_model(self.out / "best")
        return True

    def draw_samples(self) -> None:
        """A picture of how far it is."""
        self.drawn_step = self.step
        path = self.out / "samples" / f"step-{self.step:08d}.png"
        with self.ranks.together():
            if self.is_main:
                try:
                    path.parent.mkdir(exist_ok=True)
                except OSError as error:
                    raise UserError(f"out: cannot write in {self.out}: {error.strerror}") from None
        self.job.draw_samples(path, self.step)
        if self.log is not None and path.exists():
            self.log.write_picture("samples", path, self.step)

    def save(self, *, best: bool = False, wait: bool = False) -> None:
        """A checkpoint of this moment; written in the background unless `wait`."""
        self.watch.settle(self._failed)  # weights that are lost are never saved
        facts = {
            "kind": self.job.kind,
            "settings": asdict(self.job.settings),
            "step": self.step,
            "elapsed_s": self.elapsed(),
            "metrics": self.metrics,
            "best": None if math.isinf(self.best) else self.best,
            "window": self.window.settle(),
            "watch": self.watch.facts(),
            "evaluated_step": self.evaluated_step,
            "job": self.job.facts(),
        }
        try:
            self.checkpoints.wait()
        except UserError as error:  # of the save before, on all ranks: this one may find room again
            self.say(f"warning: {error}")
        self.checkpoints.save(self.step, self.job.tensors(), facts, best=best, wait=wait)
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def _write_model(self, folder: Path) -> None:
        write = self.job.model_writer()
        with self.ranks.together():
            if write is not None:
                replace_folder(folder, write)

    def _failed(self, step: int, why: str, batch: dict[str, Any]) -> None:
        """Saves the batch, and raises."""
        path = self.out / f"bad-batch-step-{step}-rank-{self.ranks.rank}.pt"
        try:
            save_state(path, {"step": step, "why": why, **batch})
            where = f"its batch is in {path}"
        except UserError as error:
            where = str(error)
        try:  # no collective call here: it may be this rank alone that fails
            self.checkpoints.wait()
            kept = f"{resolve(self.out)} is from before"
        except UserError as error:
            kept = str(error) if "cannot write" in str(error) else "no checkpoint was saved yet"
        raise UserError(f"{why} at step {step}; {where}; {kept}: try a lower learning rate")

    def close(self) -> None:
        """Closes the log, and lets a checkpoint that is being written be finished: ranks end their talk after this."""
        if self.log is not None:
            self.log.close()
        with suppress(UserError):  # the run has ended well, or ends with an error of its own
            self.checkpoints.wait()

    @contextmanager
    def _bar(self):
        columns = (
            TextColumn(self.job.kind),
            BarColumn(),
            TextColumn("{task.percentage:5.1f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, disable=not self.is_main) as bar:
            task = bar.add_task(self.job.kind, total=1.0, note="")
            yield lambda progress, note: bar.update(
                task, completed=progress, note=note or bar.tasks[task].fields["note"]
            )


class _LossWatch:
    """Looks at losses and gradient norms one step late, and raises where training is lost."""

    WATCHED = ("loss", "grad_norm", "disc_loss", "disc_grad_norm")

    def __init__(self, diverged_at: float) -> None:
        self.diverged_at = diverged_at
        self.mean, self.lowest, self.steps = 0.0, math.inf, 0
        self.waiting: tuple[int, dict[str, torch.Tensor], Any, dict[str, Any]] | None = None

    def look(self, step: int, values: dict[str, torch.Tensor], batch: dict[str, Any], failed) -> None:
        """Takes note of a step that has been launched; judges the one before it."""
        self.settle(failed)
        seen = {name: values[name].detach() for name in self.WATCHED if name in values}
        copied = None
        if seen["loss"].is_cuda:
            # Copied as soon as they are there: read later, they would come after all that is launched till then.
            seen = {name: value.to("cpu", non_blocking=True) for name, value in seen.items()}
            copied = torch.cuda.Event()
            copied.record()
        self.waiting = (step, seen, copied, batch)

    def settle(self, failed) -> None:
        """Judges the step that waits. Waits for the device to have done it."""
        if self.waiting is None:
            return
        (step, seen, copied, batch), self.waiting = self.waiting, None
        if copied is not None:
            copied.synchronize()
        numbers = {name: float(value) for name, value in seen.items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                failed(step, f"{name} became {value}", batch)
        # Over about fifty steps, the same on every rank only nearly: each may raise, and torchrun ends the others.
        self.mean += (numbers["loss"] - self.mean) / min(50, self.steps + 1)
        self.steps += 1
        if self.steps < 50:
            return
        self.lowest = min(self.lowest, self.mean)
        if self.diverged_at and self.mean > self.diverged_at * abs(self.lowest):
            failed(step, f"the loss has diverged: its running mean is {self.mean:.4g}, it was {self.lowest:.4g}", batch)

    def facts(self) -> dict[str, Any]:
        return {"mean": self.mean, "lowest": None if math.isinf(self.lowest) else self.lowest, "steps": self.steps}

    def set_facts(self, facts: dict[str, Any]) -> None:
        self.mean, self.steps = facts["mean"], facts["steps"]
        self.lowest = math.inf if facts["lowest"] is None else facts["lowest"]
