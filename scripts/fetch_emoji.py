#!/usr/bin/env python3
"""Fetch the emoji pictures the demo model is trained on (Noto Emoji: SIL OFL 1.1 / Apache-2.0).

    python scripts/fetch_emoji.py                       # npm pack, then extract into data/emoji
    python scripts/fetch_emoji.py --from-tarball FILE   # extract a package that is already here

Leaves OUT/emoji.json and OUT/img/google/64/*.png. Standard library only.
"""

from __future__ import annotations

import argparse
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


if __name__ == "__main__":
    main()
