"""What comes when: the order of examples and the seeds of everything random, as functions of (seed, place in the run).

So a resumed run takes the very steps an uninterrupted one would have taken, on any number of ranks and workers, and no
generator's state has to be stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from var_fast.errors import UserError
from var_fast.training.ranks import Ranks


def step_seed(seed: int, step: int) -> int:
    """One 63-bit seed per (seed, step), well mixed (the finaliser of splitmix64)."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def position_seed(seed: int, position: int) -> int:
    """The seed of what is random about one example, by its position in the endless stream of examples of a run."""
    return step_seed(step_seed(seed, -1) ^ 0x5851F42D4C957F2D, position)  # another stream than that of the steps


@lru_cache(maxsize=4)
def epoch_order(count: int, epoch: int, seed: int) -> torch.Tensor:
    """(count,) int64: the permutation in which epoch number `epoch` takes `count` examples. Not to be written to."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(step_seed(seed, -2 - epoch)))


def check_batch(batch: int, ranks: Ranks, parts: int) -> None:
    """Raises UserError if the examples of a step cannot be divided evenly."""
    if batch < 1 or batch % (ranks.count * parts):
        raise UserError(f"batch: got {batch}, expected a multiple of {ranks.count} (ranks) times {parts} (parts)")


def batch_positions(step: int, batch: int, *, rank: int = 0, ranks: int = 1, part: int = 0, parts: int = 1) -> range:
    """Positions, in the endless stream of examples, of one rank's share of a step.

    `batch` examples make a step, of all ranks together. With `parts` > 1 (gradient accumulation) the share is the one
    of pass number `part`. All shares are of one size, and follow each other: part 0 of rank 0, of rank 1, ..., part 1
    of rank 0, ... Raises ValueError where `batch` is no multiple of ranks * parts.
    """
    share, rest = divmod(batch, ranks * parts)
    if rest or not share:
        raise ValueError(f"batch is {batch}, expected a multiple of {ranks} ranks * {parts} parts")
    first = step * batch + (part * ranks + rank) * share
    return range(first, first + share)


def examples_at(positions: Iterable[int], count: int, seed: int) -> list[int]:
    """Which of `count` examples stand at these positions; every epoch is a fresh permutation."""
    return [int(epoch_order(count, p // count, seed)[p % count]) for p in positions]


def share_of(items: Sequence, rank: int, ranks: int) -> Sequence:
    """A rank's contiguous share of `items`: the shares follow each other and differ by at most one in length."""
    n = len(items)
    return items[n * rank // ranks : n * (rank + 1) // ranks]
