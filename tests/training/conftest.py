"""A tiny emoji folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


def picture(seed: int) -> Image.Image:
    """A 64x64 RGBA picture: a coloured disc with an edge, transparent around it."""
    draw = np.random.RandomState(seed)
    y, x = np.mgrid[:64, :64]
    inside = (x - draw.randint(20, 44)) ** 2 + (y - draw.randint(20, 44)) ** 2 < draw.randint(150, 500)
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[inside] = [*draw.randint(0, 256, 3), 255]
    return Image.fromarray(rgba, "RGBA")


def write_emoji(root: Path, entries: list[dict]) -> Path:
    """Write emoji.json and one picture per entry and skin variation."""
    folder = root / "img" / "google" / "64"
    folder.mkdir(parents=True)
    for number, entry in enumerate(entries):
        entry["has_img_google"] = True
        entry["image"] = entry["unified"].lower() + ".png"
        for tone, variant in enumerate(entry.get("skin_variations", {}).values()):
            variant.update(has_img_google=True, image=variant["unified"].lower() + ".png")
            picture(1000 * number + tone + 1).save(folder / variant["image"])
        picture(1000 * number).save(folder / entry["image"])
    (root / "emoji.json").write_text(json.dumps(entries))
    return root


def entry(unified: str, subcategory: str, tones: int = 0, category: str = "Things") -> dict:
    made = {"unified": unified, "category": category, "subcategory": subcategory}
    if tones:
        made["skin_variations"] = {tone: {"unified": f"{unified}-{tone}"} for tone in TONES[:tones]}
    return made


@pytest.fixture(scope="session")
def emoji_folder(tmp_path_factory) -> Path:
    """48 emoji in three classes, one of which is too small to be a class; five skin tones on some."""
    entries = [entry(f"{0x1F400 + i:X}", "animal", tones=5 if i < 2 else 0) for i in range(24)]
    entries += [entry(f"{0x1F500 + i:X}", "shape") for i in range(21)]
    entries += [entry(f"{0x1F600 + i:X}", "rare") for i in range(3)]
    entries.append(entry("1F3FB", "skin-tone", category="Component"))
    return write_emoji(tmp_path_factory.mktemp("emoji"), entries)
