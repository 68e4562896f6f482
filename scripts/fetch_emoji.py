#!/usr/bin/env python3
"""Fetch the emoji pictures the demo model is trained on (Noto Emoji: SIL OFL 1.1 / Apache-2.0).

    python scripts/fetch_emoji.py                       # npm pack, then extract into data/emoji
    python scripts/fetch_emoji.py --from-tarball FILE   # extract a package that is already here

Leaves OUT/emoji.json and OUT/img/google/64/*.png, which takes the standard library only. Of these it makes a folder of
images as var-fast trains on: OUT/train/<subcategory>/*.png and OUT/val/<subcategory>/*.png, which takes what var_fast
itself takes (torch and Pillow).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "emoji-datasource-google@15.1.2"
PICTURES = "img/google/64/"


def fail(message: str) -> None:
    sys.exit(f"fetch_emoji: {message}")


def download(folder: Path) -> Path:
    """The package's tarball, downloaded into `folder` with `npm pack`."""
    if shutil.which("npm") is None:
        fail(f"npm was not found: install Node.js, or give --from-tarball FILE with the npm package {PACKAGE}")
    done = subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True)
    tarballs = sorted(folder.glob("*.tgz"))
    if done.returncode or not tarballs:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        fail(f"`npm pack {PACKAGE}` failed: {reason[-1]}")
    return tarballs[0]


def wanted(name: str) -> str | None:
    """Where a member of the tarball goes below OUT; None for what is not needed."""
    inner = name.partition("/")[2]
    if inner == "emoji.json":
        return inner
    file_name = inner.removeprefix(PICTURES)
    if inner.startswith(PICTURES) and file_name.endswith(".png") and "/" not in file_name:
        return inner
    return None


def extract(tarball: Path, out: Path) -> int:
    """Write the wanted members below `out`; returns how many pictures there were."""
    pictures = 0
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for member in archive:
                target = wanted(member.name) if member.isfile() else None
                if target is None:
                    continue
                path = out / target
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(path.name + ".part")
                with archive.extractfile(member) as source, open(part, "wb") as sink:
                    shutil.copyfileobj(source, sink)
                os.replace(part, path)
                pictures += target != "emoji.json"
    except (tarfile.TarError, OSError, EOFError) as error:
        fail(f"cannot extract {tarball}: {error}")
    if not pictures or not (out / "emoji.json").is_file():
        fail(f"{tarball} holds no emoji.json and {PICTURES}*.png: expected the npm package {PACKAGE}")
    return pictures


def write_classes(out: Path) -> tuple[int, int, int]:
    """The pictures as RGB on white in a folder per split and class; returns how many there are of train, val, classes.

    At most two skin tones of an emoji besides its own, subcategories of fewer than 8 pictures left out; what is held
    out is the same as ever (var_fast/training/emoji.py).
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    try:
        from PIL import Image

        from var_fast.errors import UserError
        from var_fast.training.emoji import load_emoji
    except ImportError as error:
        fail(
            f"emoji.json and img/ are in {out}, but train/ and val/ need the module {error.name}: "
            "pip install torch numpy Pillow typer, then run this again"
        )
    try:
        emoji = load_emoji(out, 64, skin_variants=2, min_per_class=8)
    except UserError as error:
        fail(str(error))
    for image_u8, label, held_out, code in zip(emoji.images_u8, emoji.labels, emoji.held_out, emoji.names):
        folder = out / ("val" if held_out else "train") / emoji.classes[label]
        content = io.BytesIO()
        Image.fromarray(image_u8.permute(1, 2, 0).contiguous().numpy()).save(content, "png")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f".{code}.part"
            part.write_bytes(content.getvalue())
            os.replace(part, folder / f"{code}.png")
        except OSError as error:
            fail(f"cannot write {folder}: {error.strerror}")
    held_out = int(emoji.held_out.sum())
    return len(emoji.names) - held_out, held_out, len(emoji.classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/emoji"), help="folder to write (default: data/emoji)")
    parser.add_argument("--from-tarball", type=Path, help="an npm tarball that is already here; nothing is downloaded")
    args = parser.parse_args()
    if args.from_tarball:
        pictures = extract(args.from_tarball, args.out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            pictures = extract(download(Path(folder)), args.out)
    print(f"{pictures} pictures in {args.out / PICTURES}")
    train, val, classes = write_classes(args.out)
    print(f"{train} of {classes} classes in {args.out / 'train'}, {val} in {args.out / 'val'}")


if __name__ == "__main__":
    main()
