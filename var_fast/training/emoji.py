"""The emoji data set: class-conditional pictures small enough to train on with a CPU.

Pictures and names come from the npm package `emoji-datasource-google` (see scripts/fetch_emoji.py). The class of
a picture is its subcategory. The held-out part is chosen by a hash of what an emoji shows, leaving out skin tone
and gender, so that no near copy of a held-out picture is in the training part.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from var_fast.errors import UserError

_SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
# Zero-width joiner, variation selector, female and male sign, "facing right": they vary an emoji, they do not name it.
_MODIFIERS = {"200D", "FE0F", "2640", "2642", "27A1"}
_PERSONS = {"1F468": "1F9D1", "1F469": "1F9D1"}  # man, woman -> person


@dataclass(frozen=True)
class EmojiSet:
    """Pictures with their classes and the split into a training and a held-out part."""

    images_u8: torch.Tensor  # (N, 3, S, S) uint8, on white
    labels: torch.Tensor  # (N,) int64, index into classes
    held_out: torch.Tensor  # (N,) bool
    classes: list[str]  # sorted subcategory names
    names: list[str]  # (N,) code points, e.g. "1F44B-1F3FB"
    groups: list[str]  # (N,) what the emoji shows: the unit of the split
    dropped: dict[str, int]  # subcategories left out -> their number of pictures


def base_group(unified: str) -> str:
    """What an emoji shows, skin tone, gender and direction left out: the unit the split is made by."""
    first, *rest = unified.upper().split("-")
    points = [first] + [p for p in rest if p not in _SKIN_TONES and p not in _MODIFIERS]
    return "-".join(_PERSONS.get(p, p) for p in points)


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2.0**48


def _entries(root: Path, skin_variants: int) -> list[tuple[str, str, Path]]:
    """(code points, subcategory, picture file) of every emoji and of at most `skin_variants` skin tones of each."""
    index = root / "emoji.json"
    try:
        records = json.loads(index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"data: {index} does not exist; run scripts/fetch_emoji.py --out {root} first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"data: cannot read {index}: {error}") from None
    pictures = root / "img" / "google" / "64"
    found = []
    try:
        for record in records:
            if record["category"] == "Component" or not record.get("has_img_google"):
                continue
            variants = [v for v in record.get("skin_variations", {}).values() if v.get("has_img_google")]
            variants.sort(key=lambda v: unit_hash("skin " + v["unified"]))
            for item in [record, *variants[:skin_variants]]:
                path = pictures / item["image"]
                if path.is_file():
                    found.append((item["unified"], record["subcategory"], path))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"data: {index} is no list of emoji: {type(error).__name__}: {error}") from None
    if not found:
        raise UserError(f"data: no pictures in {pictures}; run scripts/fetch_emoji.py --out {root} first")
    return sorted(found)


def _held_out(groups: list[str], class_names: list[str], fraction: float) -> torch.Tensor:
    """(N,) bool: of every class about `fraction` of its groups, those with the lowest hashes, and never all.

    A group counts for one class only, should its pictures be in two. Shares are rounded up or down by a hash of the
    class's name, so that small classes are held out of as often as large ones.
    """
    members: dict[str, set[str]] = {}
    for group, name in sorted(zip(groups, class_names, strict=True), key=lambda pair: pair[1]):
        if not any(group in others for others in members.values()):
            members.setdefault(name, set()).add(group)
    chosen: set[str] = set()
    for name, own in members.items():
        quota = min(int(len(own) * fraction + unit_hash("quota " + name)), len(own) - 1)
        chosen.update(sorted(own, key=lambda group: unit_hash("split " + group))[:quota])
    return torch.tensor([group in chosen for group in groups])


def _read(path: Path, size: int) -> np.ndarray:
    """(3, size, size) uint8: the RGBA picture on white."""
    try:
        with Image.open(path) as picture:
            rgba = picture.convert("RGBA")
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error}") from None
    on_white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if on_white.size != (size, size):
        on_white = on_white.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(on_white).transpose(2, 0, 1)


def load_emoji(
    root: str | Path,
    size: int = 32,
    *,
    skin_variants: int = 2,
    min_per_class: int = 8,
    held_out_fraction: float = 0.05,
) -> EmojiSet:
    """Read the emoji below `root` (emoji.json and img/google/64/*.png) as `size` x `size` pictures.

    skin_variants: at most so many skin-tone variants of one emoji, so that hands and people do not drown the rest.
    min_per_class: subcategories with fewer pictures (after that limit) are left out and listed in `dropped`.
    The split depends on neither option. Raises UserError if the folder holds no such data.
    """
    if size < 1:
        raise UserError(f"size: got {size}, expected a positive number of pixels")
    if not 0.0 <= held_out_fraction < 1.0:
        raise UserError(f"held_out_fraction: got {held_out_fraction}, expected a number in [0, 1)")
    entries = _entries(Path(root), skin_variants)
    counts = Counter(subcategory for _, subcategory, _ in entries)
    dropped = {name: n for name, n in sorted(counts.items()) if n < min_per_class}
    # The split is made over all subcategories, so that it stays the same whichever are dropped.
    every_class = sorted(counts)
    groups = [base_group(code) for code, _, _ in entries]
    held_out = _held_out(groups, [s for _, s, _ in entries], held_out_fraction)
    kept = [i for i, (_, subcategory, _) in enumerate(entries) if subcategory not in dropped]
    if not kept:
        raise UserError(f"min_per_class: got {min_per_class}, but no class has so many pictures")
    classes = [name for name in every_class if name not in dropped]
    return EmojiSet(
        images_u8=torch.from_numpy(np.stack([_read(entries[i][2], size) for i in kept])),
        labels=torch.tensor([classes.index(entries[i][1]) for i in kept]),
        held_out=held_out[kept],
        classes=classes,
        names=[entries[i][0] for i in kept],
        groups=[groups[i] for i in kept],
        dropped=dropped,
    )
