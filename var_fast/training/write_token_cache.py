"""Encodes every image once and keeps its tokens (for the format see token_cache.py).

A shard is a fixed range of the images, and is made in fixed batches: so its bytes are the same whichever process makes
it, and whether or not others were made before. Beside a shard that is done lies its record, train-00000.json; a run
that was killed goes on with the shards that have none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from var_fast.checkpoint import load_checkpoint, save_checkpoint
from var_fast.errors import UserError
from var_fast.models import VQVAE
from var_fast.training.data import Augmentation, ImageSource, open_images, to_float
from var_fast.training.data.loader import read_batches
from var_fast.training.files import weights_hash, write_atomic, write_json
from var_fast.training.order import position_seed
from var_fast.training.ranks import Ranks
from var_fast.training.token_cache import (
    INDEX,
    KIND,
    LABELS,
    SETTINGS,
    SPLITS,
    TOKENIZER,
    VERSION,
    file_hash,
    is_token_cache,
    shard_paths,
    token_dtype,
    views_of,
)

if TYPE_CHECKING:
    from rich.console import Console

# what of the settings may differ when a killed run goes on
NOT_COMPARED = ("source",)


@dataclass(frozen=True)
class CacheSummary:
    """What a cache holds, and what it took to go on to its end."""

    images: dict[str, int]  # by split
    skipped: list[str]  # names of corrupt images
    sequences: int  # images times views
    bytes: int  # of all tokens and labels
    encoded: int  # images that this process encoded just now
    seconds: float  # the time this took


@dataclass(frozen=True)
class _Shard:
    """A range of a split's images."""

    split: str
    number: int
    images: range


@dataclass(frozen=True)
class Views:
    """All views of a picture, (V, 3, S, S) uint8: the centre, random windows, and these mirrored."""

    augmentation: Augmentation
    crops: int
    flips: bool
    seed: int

    def __call__(self, picture: Image.Image, position: int) -> torch.Tensor:
        windows = [self.augmentation.centre(picture)]
        for crop in range(1, self.crops):
            generator = torch.Generator().manual_seed(position_seed(self.seed, position * self.crops + crop))
            windows.append(self.augmentation.random(picture, generator))
        windows_V3HW = torch.stack(windows)
        return torch.cat([windows_V3HW, windows_V3HW.flip(-1)]) if self.flips else windows_V3HW


def write_token_cache(
    data: str | Path,
    out: str | Path,
    vae: VQVAE,
    *,
    enlarge: float = 1.125,
    crops: int = 1,
    flips: bool = False,
    batch: int = 64,
    shard_images: int = 8192,
    seed: int = 0,
    workers: int = 0,
    restart: bool = False,
    ranks: Ranks | None = None,
    console: Console | None = None,
) -> CacheSummary:
    """Writes the tokens of all images of `data` to the folder `out`, or goes on where an earlier run stopped.

    vae: becomes float32, in evaluation mode, on the ranks' device. crops: views of a training image without mirrored
    ones, of which the first is its centre. batch: views encoded at once. shard_images: images per file. restart: throw
    away what is in `out`. ranks: they share the shards; `out` is a folder that all see. console: where a progress bar
    goes.
    Raises UserError for bad arguments and data, where `out` holds something else or was begun with other settings, and
    if the disk has not enough room.
    """
    ranks = Ranks() if ranks is None else ranks
    for name, value in (("crops", crops), ("batch", batch), ("shard_images", shard_images)):
        if value < 1:
            raise UserError(f"{name}: got {value}, expected a positive number")
    out = Path(out)
    augmentation = Augmentation(vae.quantize.v_patch_nums[-1] * vae.downsample, enlarge)
    sources = _open_sources(data)
    vae.float().eval()
    settings = {
        "kind": KIND,
        "version": VERSION,
        "tokenizer_hash": weights_hash(vae),
        "patch_nums": list(vae.quantize.v_patch_nums),
        "vocab_size": vae.vocab_size,
        "size": augmentation.size,
        "enlarge": enlarge,
        "crops": crops,
        "flips": flips,
        "batch": batch,
        "shard_images": shard_images,
        "seed": seed,
        "device": ranks.device.type,  # another kind may round otherwise, and choose another code of two near ones
        "source": str(data),
        "fingerprints": {split: source.fingerprint() for split, source in sources.items()},
        "classes": sources["train"].classes,
    }
    shards = [
        _Shard(split, number, range(first, min(first + shard_images, len(source))))
        for split, source in sources.items()
        for number, first in enumerate(range(0, len(source), shard_images))
    ]
    with ranks.together():
        if ranks.is_main:
            _prepare(out, vae, settings, restart)
            _check_room(out, shards, settings)
    vae.to(ranks.device)
    began, encoded = time.perf_counter(), 0
    todo = [shard for shard in shards[ranks.rank :: ranks.count] if _record(out, shard) is None]
    total = sum(len(shard.images) for shard in todo)
    with ranks.together(), _progress(console if ranks.is_main else None, ranks, total) as advance:
        for split, source in sources.items():
            look = Views(augmentation, crops, flips, seed) if split == "train" else Views(augmentation, 1, False, seed)
            mine = [shard for shard in todo if shard.split == split]
            for shard, tokens, labels, skipped in _encode(source, look, vae, mine, batch, workers, advance):
                _write_shard(out, shard, tokens, labels, skipped)
                encoded += len(shard.images)
    seconds = time.perf_counter() - began
    with ranks.together():
        if ranks.is_main:
            _write_index(out, settings, shards)
    return _summary(out, encoded, seconds)


def _open_sources(data: str | Path) -> dict[str, ImageSource]:
    train = open_images(data, "train")
    val = open_images(data, "val", classes=train.classes)
    return {"train": train} if val is None else {"train": train, "val": val}


# --------------------------------------------------------------------------------------------------------------- before
def _prepare(out: Path, vae: VQVAE, settings: dict[str, Any], restart: bool) -> None:
    """Leaves `out` with these settings and this tokenizer, and with no shards of others."""
    try:
        if is_token_cache(out):
            if not restart:
                _compare(out, settings)
            _clear(out, shards_too=restart)
        elif out.exists() and (not out.is_dir() or not all(_is_left_over(path) for path in out.iterdir())):
            raise UserError(f"out: {out} is there and holds no token cache, expected a new or empty folder")
    except OSError as error:
        raise UserError(f"out: cannot use {out}: {error.strerror}") from None
    write_json(out / SETTINGS, settings)
    try:
        stored = weights_hash(load_checkpoint(out / TOKENIZER).vae)
    except UserError:
        stored = None
    if stored != settings["tokenizer_hash"]:
        save_checkpoint(out / TOKENIZER, vae, dtype=torch.float32)


def _clear(out: Path, shards_too: bool) -> None:
    """Removes what killed runs left half written and, for a new beginning, index and shards: not the settings, which
    show, should this be killed, that here lies a cache."""
    own = rf"index\.json|({'|'.join(SPLITS)})-\d{{5,}}\.(json|tokens\.npy|labels\.npy)"
    for path in [*out.iterdir(), *out.glob(f"{TOKENIZER}/.*")]:
        if _is_left_over(path) or (shards_too and re.fullmatch(own, path.name)):
            path.unlink()


def _is_left_over(path: Path) -> bool:
    """Whether a killed run left this half written."""
    return re.fullmatch(r"\..*\.(part|tmp)", path.name) is not None


def _compare(out: Path, settings: dict[str, Any]) -> None:
    """Raises UserError that names the first of the settings that differs from what `out` was begun with."""
    file = out / SETTINGS
    try:
        begun = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(begun, dict):
            raise ValueError("no settings")
    except (OSError, ValueError, RecursionError):
        raise UserError(f"out: cannot read {file}; --restart begins anew") from None
    for name, ours in settings.items():
        theirs = begun.get(name)
        if theirs == ours or name in NOT_COMPARED:
            continue
        if name == "tokenizer_hash":
            what = f"another tokenizer ({str(theirs)[:12]}, now {ours[:12]})"
        elif name in ("fingerprints", "classes"):
            what = f"other images or classes than {settings['source']} has now"
        else:
            what = f"{name} {str(theirs)[:40]}, now {str(ours)[:40]}"
        raise UserError(f"out: {out} was begun with {what}: expected the same to go on; --restart begins anew")


def _check_room(out: Path, shards: list[_Shard], settings: dict[str, Any]) -> None:
    per_view = sum(pn * pn for pn in settings["patch_nums"]) * token_dtype(settings["vocab_size"]).itemsize
    needed = 0
    for shard in shards:
        views = views_of(shard.split, settings["crops"], settings["flips"])
        if not shard_paths(out, shard.split, shard.number)[0].exists():
            needed += len(shard.images) * (views * per_view + LABELS.itemsize)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(f"out: {out} needs {needed / 1e6:,.0f} MB for the tokens, but {free / 1e6:,.0f} MB are free")


# ---------------------------------------------------------------------------------------------------------------- while
def _encode(
    source: ImageSource,
    look: Views,
    vae: VQVAE,
    shards: list[_Shard],
    batch: int,
    workers: int,
    advance: Callable[[int], None],
) -> Iterator[tuple[_Shard, np.ndarray, np.ndarray, list[str]]]:
    """(shard, tokens (n, V, L), labels (n,), names of corrupt images) of each shard."""
    device = next(vae.parameters()).device
    per_batch = max(1, batch // (look.crops * (2 if look.flips else 1)))
    plan = [
        (shard, shard.images[first : first + per_batch])
        for shard in shards
        for first in range(0, len(shard.images), per_batch)
    ]
    items = [[(i, i) for i in images] for _, images in plan]
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    skipped: list[str] = []
    empty = np.empty((0, look.crops * (2 if look.flips else 1), sum(pn * pn for pn in vae.quantize.v_patch_nums)), int)
    for (shard, images), found in zip(plan, read_batches(source, look, items, workers=workers, replace=False)):
        if len(found):
            tokens_BL = _tokens(vae, found.images_u8.flatten(0, 1), batch, device)
            tokens.append(tokens_BL.unflatten(0, found.images_u8.shape[:2]).numpy())
        labels.append(found.labels.numpy())
        skipped += found.skipped
        advance(len(images))
        if images[-1] == shard.images[-1]:
            stored = np.concatenate([empty, *tokens]).astype(token_dtype(vae.vocab_size))
            yield shard, stored, np.concatenate(labels).astype(LABELS), skipped
            tokens, labels, skipped = [], [], []


@torch.inference_mode()
def _tokens(vae: VQVAE, images_u8: torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    """(B, L) int64 on the CPU, made `batch` at a time, in a way that gives the same numbers each time."""
    parts = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for part_B3HW in images_u8.split(batch):
            parts.append(torch.cat(vae.img_to_idxBl(to_float(part_B3HW.to(device))), dim=1).cpu())
    return torch.cat(parts)


def _write_shard(out: Path, shard: _Shard, tokens: np.ndarray, labels: np.ndarray, skipped: list[str]) -> None:
    """The two files, and then the record that says that they are whole."""
    record: dict[str, Any] = {"images": len(labels)}
    files = zip(("tokens", "labels"), shard_paths(out, shard.split, shard.number), (tokens, labels))
    for name, path, array in files:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        content = buffer.getvalue()
        record[f"{name}_sha256"] = hashlib.sha256(content).hexdigest()
        write_atomic(path, lambda part, content=content: part.write_bytes(content))
    write_json(_record_path(out, shard), {**record, "skipped": skipped})


def _record_path(out: Path, shard: _Shard) -> Path:
    return out / f"{shard.split}-{shard.number:05}.json"


def _record(out: Path, shard: _Shard) -> dict[str, Any] | None:
    """The record of a shard whose files are as it says; None if it is to be made."""
    try:
        record = json.loads(_record_path(out, shard).read_text(encoding="utf-8"))
        hashes = [file_hash(path) for path in shard_paths(out, shard.split, shard.number)]
        whole = hashes == [record["tokens_sha256"], record["labels_sha256"]]
        return record if whole and len(shard.images) == record["images"] + len(record["skipped"]) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


@contextlib.contextmanager
def _progress(console: Console | None, ranks: Ranks, total: int) -> Iterator[Callable[[int], None]]:
    if console is None or not total:
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    what = "tokenizing" if ranks.count == 1 else f"tokenizing (one of {ranks.count} shares)"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


# ---------------------------------------------------------------------------------------------------------------- after
def _write_index(out: Path, settings: dict[str, Any], shards: list[_Shard]) -> None:
    splits: dict[str, dict[str, Any]] = {}
    for shard in shards:
        split = splits.setdefault(shard.split, {"images": 0, "skipped": [], "shards": []})
        record = json.loads(_record_path(out, shard).read_text(encoding="utf-8"))
        split["skipped"] += record.pop("skipped")
        split["images"] += record["images"]
        split["shards"].append(record)
    for name, split in splits.items():
        if not split["images"]:
            raise UserError(
                f"data: no image of {name} in {settings['source']} can be read ({split['skipped'][0]}, ...)"
            )
    write_json(out / INDEX, {**settings, "splits": splits})


def _summary(out: Path, encoded: int, seconds: float) -> CacheSummary:
    index = json.loads((out / INDEX).read_text(encoding="utf-8"))
    splits = index["splits"]
    files = [path for name in splits for i in range(len(splits[name]["shards"])) for path in shard_paths(out, name, i)]
    return CacheSummary(
        images={name: split["images"] for name, split in splits.items()},
        skipped=[name for split in splits.values() for name in split["skipped"]],
        sequences=sum(split["images"] * views_of(n, index["crops"], index["flips"]) for n, split in splits.items()),
        bytes=sum(path.stat().st_size for path in files),
        encoded=encoded,
        seconds=seconds,
    )
