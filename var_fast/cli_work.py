"""What the commands share: checks of where output goes, images made in parts, files written, progress."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_fast.cli_arguments import image_name
from var_fast.errors import UserError

if TYPE_CHECKING:
    import torch

    from var_fast.engine import Sampler
    from var_fast.training.ranks import Ranks

Pairs = list[tuple[int, int]]  # a label and a seed for each image


def pair_up(labels: Sequence[int], seeds: Sequence[int]) -> Pairs:
    """As many pairs as there are labels or seeds, whichever are more; the others are used again in turn."""
    count = max(len(labels), len(seeds))
    return [(labels[i % len(labels)], seeds[i % len(seeds)]) for i in range(count)]


def columns_by_label(labels: Sequence[int], count: int) -> int | None:
    """The number of columns that puts every label of `pair_up` in one of its own, if there are few and they come out
    even."""
    return len(labels) if 1 < len(labels) <= 16 and len(labels) < count and count % len(labels) == 0 else None


# --------------------------------------------------------------------------------------------------------------- before
def require_png(out: Path, save_dir: Path | None = None) -> None:
    """Raises UserError if --out is no name of a PNG, or --save-dir's as well."""
    if out.suffix.lower() != ".png":
        raise UserError(f"--out is {str(out)!r}, expected a name that ends in .png")
    if save_dir is not None and os.path.realpath(save_dir) == os.path.realpath(out):
        raise UserError(f"--out and --save-dir are both {str(out)!r}, expected a file and a directory")


def check_places(out: Path, save_dir: Path | None = None) -> None:
    """Raises UserError if --out could not be written now, or files in --save-dir, which may still have to be made."""
    from var_fast.images import check_writable

    check_writable(out)
    if save_dir is None:
        return
    if os.path.isdir(save_dir):
        check_writable(save_dir / "image.png")
    elif os.path.lexists(save_dir):
        raise UserError(f"--save-dir is {str(save_dir)!r}, expected a directory")
    else:
        check_writable(save_dir)


def default_batch(size: int, device_type: str) -> int:
    """Images of `size` pixels made at once."""
    if size <= 64:
        return 64
    return 16 if device_type == "cuda" else 4


def default_upscale(size: int) -> int:
    """How many times images of `size` pixels are enlarged."""
    return 4 if size <= 64 else 2 if size <= 128 else 1


# ---------------------------------------------------------------------------------------------------------------- while
def make_images(
    make: Callable[[list[int], list[int]], Iterator[torch.Tensor]],
    pairs: Pairs,
    batch: int,
    steps: int = 1,
    ranks: Ranks | None = None,
) -> tuple[list[torch.Tensor], float]:
    """Images of the B pairs, made `batch` at a time with a progress bar, and the seconds it took.

    `make` yields images (b, 3, H, W) of b labels and seeds `steps` times; so many tensors (B, 3, H, W) come back. Each
    rank makes a contiguous share of the pairs, and the main one gets all images (the others none); the bar is the main
    rank's and shows its share. Raises UserError if memory runs out and if the last images are not finite.
    """
    import torch

    from var_fast.training.order import share_of
    from var_fast.training.ranks import Ranks

    ranks = ranks or Ranks()
    own = share_of(pairs, ranks.rank, ranks.count)
    parts: list[list[torch.Tensor]] = []
    began = time.perf_counter()
    with (
        ranks.together(),
        progress("sampling", len(own) * steps, shown=ranks.is_main) as advance,
        memory_advice(f"try a --batch below {batch}"),
    ):
        for start in range(0, len(own), batch):
            labels, seeds = (list(numbers) for numbers in zip(*own[start : start + batch]))
            parts.append([])
            for images_B3HW in make(labels, seeds):
                parts[-1].append(images_B3HW.cpu())
                advance(len(labels))
    parts = [part for of_one_rank in ranks.to_main(parts) for part in of_one_rank]
    seconds = time.perf_counter() - began
    if not ranks.is_main:
        return [], seconds
    images_per_step = [torch.cat(step) for step in zip(*parts)]
    require_finite(images_per_step[-1], "sampled images")
    return images_per_step, seconds


def require_finite(images: torch.Tensor, what: str) -> None:
    """Raises UserError if `images` hold NaN or infinity."""
    if not bool(images.isfinite().all()):
        raise UserError(f"{what} are not finite numbers: check the tokenizer's weights, or try --dtype float32")


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turns running out of memory into a UserError."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU's allocator raises a plain RuntimeError, as does nearly everything else in torch.
        words = ("can't allocate memory", "not enough memory")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(w in str(error) for w in words):
            raise
        raise UserError(f"out of memory: {advice}") from None


@contextlib.contextmanager
def progress(what: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, gone when done; yields the function that advances it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left:"), TimeRemainingColumn())
    with Progress(
        *columns, *left, console=console, transient=True, disable=not shown or not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM, which ends jobs of clusters and torchrun's processes, is as Ctrl-C within: what cleans up, runs."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def others_may_end(advice: str) -> Iterator[None]:
    """Turns the words that a rank gets to hear where another one has been killed into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise UserError(f"another process of this run has ended, so all of them do; {advice}") from None


# ---------------------------------------------------------------------------------------------------------------- after
def notes(model: str, options: dict[str, Any]) -> dict[str, str]:
    """Text chunks that every picture has."""
    from var_fast import __version__

    return {"Software": f"var_fast {__version__}", "model": model, "options": json.dumps(options)}


def sampler_notes(model: str, options: dict[str, Any], sampler: Sampler) -> dict[str, str]:
    """Text chunks of pictures that `sampler` made."""
    return notes(model, {**options, "dtype": _number_type(sampler), "device": str(sampler.device)})


def write_images(
    picture_3HW: torch.Tensor,
    images_B3HW: torch.Tensor,
    pairs: Pairs,
    classes: Sequence[str] | None,
    texts: dict[str, str],
    out: Path,
    save_dir: Path | None,
) -> None:
    """Writes the picture to `out` and, with `save_dir`, each image there; the text chunks name labels and seeds."""
    from var_fast.images import save_png

    labels, seeds = (",".join(map(str, numbers)) for numbers in zip(*pairs))
    if save_dir is not None:
        _make_folder(save_dir)
    save_png(picture_3HW, out, {**texts, "label": labels, "seed": seeds})
    if save_dir is not None:
        for image_3HW, (label, seed) in zip(images_B3HW, pairs):
            own = {"label": str(label), **({"class": classes[label]} if classes else {}), "seed": str(seed)}
            save_png(image_3HW, save_dir / image_name(label, seed, classes), {**texts, **own})


def print_summary(sampler: Sampler, count: int, size: int, seconds: float, out: Path, save_dir: Path | None) -> None:
    """What was made, how fast and where it is."""
    print(f"{count} x {size} x {size} pixels on {sampler.device} in {_number_type(sampler)}: {seconds:.2f} s")
    print(f"{seconds / count:.3f} seconds per image")
    print(f"picture: {out.absolute()}")
    if save_dir is not None:
        print(f"images:  {save_dir.absolute()}")


def _number_type(sampler: Sampler) -> str:
    return str(sampler.dtype).removeprefix("torch.")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {str(folder)!r}: {error.strerror}") from None
