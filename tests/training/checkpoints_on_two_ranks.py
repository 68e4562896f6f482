"""Run by test_run_checkpoints.py with a folder: two ranks save and load; exits with 0 if all holds.

FOLDER/plain holds a checkpoint of one rank, with its tensors in plain.pt; FOLDER/fsdp gets one of two, and fsdp.pt.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from tests.training.toy_run import Run, finished, fork_ranks, full_disk, same
from var_fast.errors import UserError
from var_fast.training.ranks import Ranks
from var_fast.training.run_checkpoints import RunCheckpoints, resolve


def resumes(folder: Path, kind: str, fused: bool, ranks: Ranks) -> Run:
    """Eight steps in one go, and with a break after four, whose save was written while training went on."""
    whole = Run(kind, fused, ranks)
    checkpoints = RunCheckpoints(folder, ranks, keep=2)
    for _ in range(8):
        whole.step()
        whole.save(checkpoints, best=len(whole.losses) == 2)
    checkpoints.wait()
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in (2, 7, 8)]
    checkpoints = RunCheckpoints(folder.with_name(f"{folder.name}-again"), ranks)
    first = Run(kind, fused, ranks)
    for step in range(5):
        first.step()
        if step == 3:
            first.save(checkpoints)
    checkpoints.wait()
    again = Run(kind, fused, ranks, seed=9)
    again.load(checkpoints, checkpoints.latest())
    for _ in range(4):
        again.step()
    assert again.losses == whole.losses
    assert same(again.whole(), whole.whole()), kind
    return whole


def work(folder: Path, ranks: Ranks) -> None:
    for kind in ("ddp", "fsdp"):
        for fused in (False, True):
            run = resumes(folder / f"{kind}-{fused}", kind, fused, ranks)
    checkpoints = RunCheckpoints(folder / "fsdp", ranks)
    run.save(checkpoints, wait=True)
    whole = run.whole()
    if ranks.is_main:
        torch.save(whole, folder / "fsdp.pt")

    # another kind of run than the one that saved: one rank -> two shards, and shards -> whole copies
    for saved, kind in (("plain", "fsdp"), ("plain", "ddp"), ("fsdp", "ddp"), ("ddp-True", "fsdp")):
        other = Run(kind, True, ranks, seed=9)
        other.load(checkpoints, resolve(folder / saved))
        if saved != "ddp-True":
            assert same(other.whole(), torch.load(folder / f"{saved}.pt", weights_only=True)), (saved, kind)

    # no room on one rank: an error on both, in the same words, what was there stays
    before = sorted(checkpoints.folder.rglob("*"))
    ranks.barrier()
    run.step()
    with full_disk(1000 if ranks.rank == 1 else 1 << 30):
        run.save(checkpoints)
        try:
            checkpoints.wait()
            raise AssertionError("the save went well")
        except UserError as error:
            assert "File too large; what was saved before is intact" in str(error), error
            told = ranks.gather(str(error))
    assert told[0] == told[1]
    ranks.barrier()
    assert sorted(checkpoints.folder.rglob("*")) == before
    ranks.barrier()
    run.save(checkpoints, wait=True)  # and there is room again
    assert checkpoints.latest() == folder / "fsdp" / "step-00000009"

    # a damaged checkpoint: an error on both
    damaged = checkpoints.latest()
    if ranks.is_main:
        (damaged / "__1_0.distcp").write_bytes(b"")
    ranks.barrier()
    try:
        run.load(checkpoints, damaged)
        raise AssertionError("the load went well")
    except UserError as error:
        assert "__1_0.distcp is cut off" in str(error), error


if __name__ == "__main__":
    warnings.simplefilter("error")
    sys.exit(0 if finished(fork_ranks(2, lambda ranks: work(Path(sys.argv[1]), ranks))) else 1)
