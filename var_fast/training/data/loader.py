"""Batches of images, decoded in worker processes.

What is in a batch depends on the data, the seed and the step alone, not on the number of workers, nor on what was read
before.
"""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError
from var_fast.training.data.augmentation import Augmentation
from var_fast.training.data.source import ImageSource
from var_fast.training.order import batch_positions, check_batch, examples_at, position_seed, share_of
from var_fast.training.ranks import Ranks

Item = tuple[int, int]  # position in the stream of examples, index in the source
Look = Callable[[Image.Image, int], torch.Tensor]  # the picture and its position -> uint8


@dataclass
class Batch:
    """Images and their classes."""

    images_u8: torch.Tensor  # (B, 3, S, S) uint8
    labels: torch.Tensor  # (B,) int64
    skipped: list[str]  # the names of corrupt images that were met

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class RandomLook:
    """A random window, a function of (seed, position)."""

    augmentation: Augmentation
    seed: int

    def __call__(self, picture: Image.Image, position: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(position_seed(self.seed, position))
        return self.augmentation.random(picture, generator)


@dataclass(frozen=True)
class CentreLook:
    """The window in the middle."""

    augmentation: Augmentation

    def __call__(self, picture: Image.Image, position: int) -> torch.Tensor:
        return self.augmentation.centre(picture)


class TrainBatches:
    """Endless iterator of this rank's batches from step number `first_step` on, `parts` of them for each step.

    The workers begin to decode at once, a few batches ahead, and ignore the signals SIGINT and SIGTERM.

    batch: examples of a step, on all ranks together. Every epoch is a fresh permutation of the source. A corrupt image
    is replaced by the next one in the source that can be read. Raises UserError if `batch` cannot be divided among the
    ranks and parts, and, from next(), if no image can be read.
    """

    def __init__(
        self,
        source: ImageSource,
        augmentation: Augmentation,
        *,
        batch: int,
        seed: int,
        ranks: Ranks | None = None,
        first_step: int = 0,
        parts: int = 1,
        workers: int = 0,
    ):
        ranks = Ranks() if ranks is None else ranks
        items = _TrainItems(len(source), batch, seed, ranks, first_step, parts)
        self._batches = read_batches(source, RandomLook(augmentation, seed), items, workers=workers, replace=True)

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Ends the workers."""
        self._batches.close()


def evaluation_batches(
    source: ImageSource,
    augmentation: Augmentation,
    *,
    batch: int,
    rank: int = 0,
    ranks: int = 1,
    limit: int | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of at most `batch` images, cut in the middle: each image once, on one of the ranks.

    limit: take so many only, evenly spread over the source. Corrupt images are left out and named. A rank whose share
    is empty, or of corrupt images only, gets no batch. Raises UserError if a rank that is alone can read none.
    """
    count = len(source) if limit is None else min(limit, len(source))
    own = share_of([i * len(source) // count for i in range(count)], rank, ranks)
    items = [[(i, i) for i in own[start : start + batch]] for start in range(0, len(own), batch)]
    waiting: Batch | None = None
    lost: list[str] = []
    for found in read_batches(source, CentreLook(augmentation), items, workers=workers, replace=False):
        if not len(found):
            lost += found.skipped
            continue
        if waiting is not None:
            yield waiting
        found.skipped[:0], lost = lost, []
        waiting = found
    if waiting is None:
        if lost and ranks == 1:
            raise UserError(f"data: none of {len(lost)} images can be read, from {lost[0]} on")
        return
    waiting.skipped += lost
    yield waiting


def read_batches(
    source: ImageSource, look: Look, items: Iterable[list[Item]], *, workers: int, replace: bool
) -> Generator[Batch]:
    """A batch for each list of `items`, in their order: what `look` makes of each image. `items` may be endless.

    replace: a corrupt image is replaced by the next one of the source that can be read; otherwise it is left out.
    """
    if workers < 0:
        raise UserError(f"workers: got {workers}, expected 0 (decode in this process) or more")
    loader = DataLoader(
        _Reader(source, look, replace),
        batch_sampler=items,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # so that torch's own is left alone
    )
    batches = _checked(iter(loader))
    # Workers that ignore signals must be told to end before Python waits for them. Registered after the loader's own
    # clean-up, so called first.
    at_exit = partial(_close, weakref.ref(batches))
    atexit.register(at_exit)
    weakref.finalize(batches, atexit.unregister, at_exit)
    return batches


def _ignore_signals(worker: int) -> None:
    """Ctrl-C, or a cluster that takes its machine back, signals all processes: the trainer, which still has to save,
    is the one to tell the workers to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _close(batches: weakref.ref[Generator[Batch]]) -> None:
    if (alive := batches()) is not None:
        alive.close()


def _checked(loaded: Iterator[Batch | UserError]) -> Generator[Batch]:
    try:
        for found in loaded:
            if isinstance(found, UserError):
                raise found
            yield found
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            f"data: a worker was killed, for want of memory or shared memory (/dev/shm)? Try fewer: {first_line(error)}"
        ) from error
    finally:
        # Not left to the garbage collector: who keeps an error keeps this frame, and Python would wait for workers that
        # nobody has told to end.
        if hasattr(loaded, "_shutdown_workers"):
            loaded._shutdown_workers()


@dataclass(frozen=True)
class _TrainItems:
    """Iterable, so that a DataLoader may begin it anew."""

    count: int
    batch: int
    seed: int
    ranks: Ranks
    first_step: int
    parts: int

    def __post_init__(self) -> None:
        check_batch(self.batch, self.ranks, self.parts)

    def __iter__(self) -> Iterator[list[Item]]:
        number = self.first_step * self.parts
        while True:
            step, part = divmod(number, self.parts)
            where = dict(rank=self.ranks.rank, ranks=self.ranks.count, part=part, parts=self.parts)
            positions = batch_positions(step, self.batch, **where)
            yield list(zip(positions, examples_at(positions, self.count, self.seed)))
            number += 1


@dataclass(frozen=True)
class _Reader(Dataset):
    """What a worker does: a batch for a list of items."""

    source: ImageSource
    look: Look
    replace: bool

    def __getitems__(self, items: list[Item]) -> Batch | UserError:
        windows: list[torch.Tensor] = []
        labels: list[int] = []
        skipped: list[str] = []
        for position, index in items:
            tries = len(self.source) if self.replace else 1
            for candidate in ((index + i) % len(self.source) for i in range(tries)):
                try:
                    windows.append(self.look(self.source.read(candidate), position))
                except (OSError, ValueError) as error:
                    if getattr(error, "errno", None) is not None:  # the disk's or the network's fault, which may pass
                        name = self.source.name(candidate)
                        return UserError(f"data: cannot read {name}: {error.strerror or first_line(error)}")
                    skipped.append(self.source.name(candidate))
                    continue
                labels.append(int(self.source.labels[candidate]))
                break
            else:
                if self.replace:
                    # handed back, since a worker that raises would wrap it in its own words
                    return UserError(f"data: none of the {tries} images can be read, from {skipped[0]} on")
        images_u8 = torch.stack(windows) if windows else torch.empty(0, dtype=torch.uint8)
        return Batch(images_u8, torch.tensor(labels, dtype=torch.int64), skipped)


def _as_it_is(batch: Batch | UserError) -> Batch | UserError:
    return batch
