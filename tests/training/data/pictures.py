"""Small pictures in both layouts: three classes, of different sizes and formats."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["bird", "cat", "dog"]


def picture(number: int, width: int = 23, height: int = 17) -> Image.Image:
    """Noise over a gradient: every window of it is unlike every other."""
    draw = np.random.RandomState(number)
    levels = np.linspace(0, 128, width)[None, :, None] + draw.randint(0, 120, (height, width, 3))
    return Image.fromarray(levels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "jpeg"}.get(kind, kind))
    return buffer.getvalue()


def write_folder(root: Path, per_class: int = 5, splits=("train", "val")) -> Path:
    for split in splits:
        for label, name in enumerate(CLASSES):
            folder = root / split / name / ("deeper" if label == 1 else ".")
            folder.mkdir(parents=True)
            for i in range(per_class if split == "train" else 2):
                picture(100 * label + i + 50 * (split == "val")).save(folder / f"{i:02}.png")
    return root


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def members(first: int, count: int, kind: str = "cls") -> dict[str, bytes]:
    made = {}
    for number in range(first, first + count):
        label = number % len(CLASSES)
        made[f"pic/{number:04}.png"] = encoded(picture(number))
        text = {"cls": f"{label}", "json": json.dumps({"label": CLASSES[label]}), "txt": f" {label}\n"}[kind]
        made[f"pic/{number:04}.{kind}"] = text.encode()
    return made
