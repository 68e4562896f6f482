"""Run by test_run_checkpoints.py: python killed_runs.py FOLDER. Runs are killed with SIGKILL and taken up again.

Exits with 0 if each found a complete checkpoint, and ended bitwise as one that nobody had disturbed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from tests.training.toy_run import Run, finished, fork_ranks, same
from var_fast.training.ranks import Ranks
from var_fast.training.run_checkpoints import RunCheckpoints

STEPS = 18


def train(folder: Path, kind: str, ranks: Ranks) -> None:
    """STEPS steps, each saved, from where the last checkpoint in `folder` stands; then result.pt."""
    checkpoints = RunCheckpoints(folder, ranks, keep=2)
    run = Run(kind, True, ranks)
    latest = checkpoints.latest()
    if latest is not None:
        run.load(checkpoints, latest)
        assert latest.name == f"step-{len(run.losses):08d}"
    while len(run.losses) < STEPS:
        run.step()
        run.save(checkpoints)
    checkpoints.wait()
    whole = run.whole() | {"losses": torch.tensor(run.losses, dtype=torch.float64)}
    if ranks.is_main:
        torch.save(whole, folder / "result.pt")


def at_any_time(folder: Path, kind: str, count: int) -> None:
    """Kills at random moments, each a few steps further on."""
    draw = random.Random(count)
    assert finished(fork_ranks(count, lambda ranks: train(folder / "whole", kind, ranks)))
    killed, steps, goal = folder / "killed", [], draw.randint(1, 5)
    while goal < STEPS - 3:
        pids = fork_ranks(count, lambda ranks: train(killed, kind, ranks))
        while step_of(killed) < goal:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.03))
        for pid in draw.sample(pids, count):
            os.kill(pid, signal.SIGKILL)
        finished(pids)
        steps.append(step_of(killed))
        goal = steps[-1] + draw.randint(2, 6)
    print(f"{kind}, {count} ranks: killed after {steps} steps")
    assert steps and steps[0] < STEPS, "no kill met a run under way"
    assert finished(fork_ranks(count, lambda ranks: train(killed, kind, ranks)))
    results = [torch.load(path / "result.pt", weights_only=True) for path in (folder / "whole", killed)]
    assert same(*results), kind
    assert sorted(path.name for path in killed.iterdir()) == ["result.pt", "step-00000017", "step-00000018"]


def step_of(folder: Path) -> int:
    latest = RunCheckpoints(folder).latest()
    return 0 if latest is None else int(latest.name[len("step-") :])


def save_state(folder: Path, step: int, **kind) -> None:
    RunCheckpoints(folder, keep=1).save(step, {"w": torch.full((50,), step)}, {"step": step}, wait=True, **kind)


def kill_before(event: int, folder: Path) -> None:
    """SIGKILL before this process opens, makes, renames or removes something in `folder` for the event-th time."""
    left = [event]

    def hook(name: str, args: tuple) -> None:
        inside = name == "open" and str(args[0]).startswith(str(folder))
        if inside or name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def at_each_event(folder: Path) -> None:
    """A kill before each change of the disk: a save, and one that replaces it and becomes the best; both prune."""
    before = folder / "before"
    save_state(before, 1, best=True)
    save_state(before, 2)

    def work(event: int, killed: Path) -> None:
        kill_before(event, killed)
        for best in (False, True):
            save_state(killed, 3, best=best)

    event = 0
    while True:
        event += 1
        killed = folder / f"killed-{event}"
        shutil.copytree(before, killed)
        pid = os.fork()
        if pid == 0:
            work(event, killed)
            os._exit(0)
        survived = finished([pid])
        checkpoints = RunCheckpoints(killed, keep=1)
        latest = checkpoints.latest()
        assert latest is not None, event
        w = torch.zeros(50, dtype=torch.int64)
        step = checkpoints.load(latest, {"w": w})["step"]
        assert step in (2, 3) and (w == step).all() and f"step-{step:08d}" in latest.name, event
        best = checkpoints.best()
        assert checkpoints.facts(best)["step"] in (1, 3), event
        save_state(killed, 5)
        names = sorted(path.name for path in killed.iterdir())
        assert names in (["step-00000001", "step-00000005"], ["step-00000003", "step-00000005"]), (event, names)
        if survived:
            break
    print(f"killed before each of {event - 1} events")
    assert event > 40


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    at_each_event(folder / "events")
    at_any_time(folder / "plain", "plain", 1)
    at_any_time(folder / "ddp", "ddp", 2)
