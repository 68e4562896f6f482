"""Samples for FID: so many images of every class in the .npz file of the ADM evaluator (Dhariwal and Nichol 2021).

The images are made in parts. Each is a small file in a folder beside the result until all are there, so an interrupted
run loses the part in work and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from var_fast.engine import Sampler
from var_fast.errors import UserError
from var_fast.evaluation.npz import read_comment, read_part, write_npz
from var_fast.images import check_writable
from var_fast.models.var import check_sampling_options
from var_fast.training.files import weights_hash, write_atomic, write_json
from var_fast.training.ranks import Ranks

PART_IMAGES = 64  # at least; a part is whole batches
MAX_SEED = 2**31 - 1
MAX_IMAGES = 2**32
SETTINGS = "settings.json"


class Exported(NamedTuple):
    """`images` in the file, of which `found` had been made before; `damaged` parts were made again."""

    images: int
    found: int
    damaged: int


def image_seed(seed: int, image: int) -> int:
    """The sampler's seed of image number `image`: seed * 2^32 + image, at most 2^63 - 1. So with seed 0, image 7 is the
    one that `var-fast sample --seeds 7` makes for its label."""
    return (seed << 32) + image


def to_uint8(images_B3HW: torch.Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8 of images in [0, 1], on the CPU: rounded to the nearest of 256 levels, as PNG files are here.

    Raises UserError if they are not finite."""
    if not bool(images_B3HW.isfinite().all()):
        raise UserError("sampled images are not finite numbers: check the weights, or try dtype float32")
    return images_B3HW.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def parts_folder(out: Path) -> Path:
    """Where the parts of `out` are until it is done."""
    if out.is_symlink():
        out = Path(os.path.realpath(out))
    return out.with_name(f"{out.name}.parts")


def export_fid(
    sampler: Sampler,
    out: str | Path,
    *,
    per_class: int = 50,
    interleave: bool = False,
    cfg: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    more_smooth: bool = False,
    seed: int = 0,
    ranks: Ranks | None = None,
    restart: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Exported:
    """Writes `per_class` images of every class, in the order of classes, to `out`: .npz, arr_0 uint8 (N, H, W, 3).

    interleave: class after class in turn instead, for the Inception Score, which the ADM evaluator averages over
    consecutive 5000 images; its other numbers do not depend on the order.
    Image i is of class i // per_class (interleaved: i modulo the number of classes) and drawn from `image_seed(seed,
    i)`, in the batch of `sampler.max_batch` images that starts at a multiple of it. So the file's bytes depend on the
    model, the options, number type, batch and kind of device alone: not on the number of ranks, nor on interruptions.
    (A CPU gives an image the same bytes in every batch; a GPU may choose other kernels for another batch, and round
    otherwise.)

    Ranks take parts in turn; all must see the folder of `out`. `OUT.parts/` keeps parts and settings; called again
    with the same settings, only what is missing or damaged is made. An `out` that is already whole and of these
    settings is left as it is. `restart` begins anew instead, and replaces any `out`. `advance` is told how many images
    were there, then how many were made, by all ranks together. Raises UserError for bad options, for parts or an `out`
    of other settings, if there is too little disk space, and if a file cannot be written: what was made stays.
    """
    ranks, out = ranks or Ranks(), Path(os.path.realpath(out))
    check_options(out, per_class, cfg, top_k, top_p, seed)
    options = dict(cfg=float(cfg), top_k=int(top_k), top_p=float(top_p), more_smooth=bool(more_smooth))
    images = sampler.var.num_classes * per_class
    if images > MAX_IMAGES:
        raise UserError(f"per_class is {per_class}, expected at most {MAX_IMAGES // sampler.var.num_classes}")
    size = sampler.var.patch_nums[-1] * sampler.vae.downsample
    with ranks.together():
        settings = {
            **options,
            "per_class": per_class,
            "interleave": interleave,
            "seed": seed,
            "classes": sampler.var.num_classes,
            "size": size,
            "dtype": str(sampler.dtype).removeprefix("torch."),
            "batch": sampler.max_batch,
            "device": sampler.device.type,
            "weights": _weights(sampler) if ranks.is_main else None,
        }
    settings = ranks.from_main(settings)
    folder = parts_folder(out)
    with ranks.together():
        complete = ranks.is_main and _prepare(out, folder, settings, restart)
    if ranks.from_main(complete):
        return Exported(images, images, 0)

    classes = sampler.var.num_classes

    def label_of(image: int) -> int:
        return image % classes if interleave else image // per_class

    parts = _Parts(folder, images, size, sampler.max_batch)
    missing, damaged = parts.to_make(ranks)
    with ranks.together():
        if ranks.is_main:
            _check_space(out, sum(parts.bytes(k) for k in missing) + images * size * size * 3)
    found = images - sum(len(parts.images(k)) for k in missing)
    if advance:
        advance(found)
    for i in range(0, len(missing), ranks.count):
        turn = missing[i : i + ranks.count]
        with ranks.together():
            if ranks.rank < len(turn):
                part = turn[ranks.rank]
                parts.write(part, _sample(sampler, parts.images(part), label_of, seed, options))
        if advance:
            advance(sum(len(parts.images(k)) for k in turn))
    with ranks.together():
        if ranks.is_main:
            _assemble(out, parts, settings)
            _remove(folder)
    return Exported(images, found, damaged)


class _Parts:
    """The files of a run: which images each holds, and whether it is there."""

    def __init__(self, folder: Path, images: int, size: int, batch: int):
        self.folder, self.total, self.size = folder, images, size
        self.length = batch * -(-PART_IMAGES // batch)
        self.count = -(-images // self.length)

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.npz"

    def images(self, part: int) -> range:
        return range(part * self.length, min((part + 1) * self.length, self.total))

    def bytes(self, part: int) -> int:
        return len(self.images(part)) * self.size * self.size * 3

    def shape(self, part: int) -> tuple[int, int, int, int]:
        return len(self.images(part)), self.size, self.size, 3

    def read(self, part: int) -> np.ndarray | None:
        """(n, H, W, 3) uint8; None if there is no such part, or it is damaged."""
        return read_part(self.path(part), self.shape(part))

    def write(self, part: int, array: np.ndarray) -> None:
        write_atomic(self.path(part), lambda file: write_npz(file, array.shape, [array]))

    def to_make(self, ranks: Ranks) -> tuple[list[int], int]:
        """The parts to make, in order, and how many of them are there but damaged; the ranks look in turn."""
        with ranks.together():
            own = [k for k in range(ranks.rank, self.count, ranks.count) if self.read(k) is None]
            damaged = sum(self.path(k).exists() for k in own)
        told = ranks.gather((own, damaged))
        return sorted(k for missing, _ in told for k in missing), sum(n for _, n in told)


def _sample(
    sampler: Sampler, images: range, label_of: Callable[[int], int], seed: int, options: dict[str, Any]
) -> np.ndarray:
    made = []
    for start in range(0, len(images), sampler.max_batch):
        batch = images[start : start + sampler.max_batch]
        labels, seeds = [label_of(i) for i in batch], [image_seed(seed, i) for i in batch]
        made.append(to_uint8(sampler.sample(labels, seeds, **options)))
    return np.concatenate(made)


def check_options(out: Path, per_class: int, cfg: float, top_k: int, top_p: float, seed: int) -> None:
    """Raises UserError for what can be seen to be wrong before a model is loaded."""
    check_sampling_options(cfg, top_k, top_p)
    if out.suffix != ".npz":
        raise UserError(f"out is {str(out)!r}, expected a name that ends in .npz")
    if per_class < 1:
        raise UserError(f"per_class is {per_class}, expected at least 1")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}, expected 0 to 2^31 - 1")


def _weights(sampler: Sampler) -> str:
    return f"{weights_hash(sampler.vae)} {weights_hash(sampler.var)}"


# ------------------------------------------------------------------------------------------- files, by the main rank
def _prepare(out: Path, folder: Path, settings: dict[str, Any], restart: bool) -> bool:
    """Readies the folder of parts for this run. True: `out` is complete already. Raises UserError."""
    check_writable(out)
    if restart:
        _remove(folder)
    elif out.exists():
        if read_comment(out) == _comment(settings):
            _remove(folder)  # left by a run that was cut short at its very end
            return True
        if not (folder / SETTINGS).exists():
            raise UserError(f"{out} exists and was not made with these settings; give another name, or --restart")
    try:
        folder.mkdir(exist_ok=True)
        for unfinished in folder.glob(".*.part"):
            unfinished.unlink()
        begun = any(folder.glob("part-*.npz"))
    except OSError as error:
        raise UserError(f"cannot use the folder {folder}: {error.strerror}") from None
    file = folder / SETTINGS
    if begun:
        _require_same(file, settings)
    else:
        write_json(file, settings)
    return False


def stored_batch(out: Path) -> int | None:
    """The batch of the run whose parts are beside `out`; None if there is none. Raises UserError."""
    batch = (_stored_settings(parts_folder(out) / SETTINGS) or {}).get("batch")
    return batch if isinstance(batch, int) and batch > 0 else None


def _stored_settings(file: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file} ({error}); --restart begins anew") from None
    if not isinstance(stored, dict):
        raise UserError(f"{file} holds no settings; --restart begins anew")
    return stored


def _require_same(file: Path, settings: dict[str, Any]) -> None:
    stored = _stored_settings(file)
    if stored is None:
        raise UserError(f"{file.parent} holds parts without {file.name}; --restart begins anew")
    other = [
        f"{name} {stored.get(name)} (now {value})" if name != "weights" else "other weights of the model"
        for name, value in settings.items()
        if stored.get(name) != value
    ]
    if other:
        raise UserError(f"{file.parent} was begun with {', '.join(other)}; give the same, or --restart to begin anew")


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(
            f"{out} needs {needed / 1e9:.2f} GB of free disk space, parts and result, but there are {free / 1e9:.2f} GB"
        )


def _assemble(out: Path, parts: _Parts, settings: dict[str, Any]) -> None:
    def arrays():
        for part in range(parts.count):
            array = parts.read(part)
            if array is None:
                raise UserError(f"{parts.path(part)} was damaged or removed; the same command makes it again")
            yield array

    shape = (parts.total, parts.size, parts.size, 3)
    # Written among the parts first: what a crash leaves there is found and removed.
    whole = parts.folder / "part-whole.npz"
    write_atomic(whole, lambda file: write_npz(file, shape, arrays(), _comment(settings)))
    try:
        os.replace(whole, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; the parts stay in {parts.folder}") from None


def _comment(settings: dict[str, Any]) -> bytes:
    """What the result tells of how it was made: the zip file's comment, so that arr_0 is all there is inside."""
    return json.dumps({"var_fast export-fid": settings}, sort_keys=True).encode()


def _remove(folder: Path) -> None:
    """Removes parts, settings and the folder, but no file that is not ours."""
    if not folder.is_dir():
        return
    try:
        for pattern in (".*.part", "part-*.npz", SETTINGS):
            for file in folder.glob(pattern):
                file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise UserError(f"cannot remove {folder}: {error.strerror}") from None
