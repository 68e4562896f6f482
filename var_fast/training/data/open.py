"""Finds out what lies at a path: folders of classes, or tar shards."""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path

from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError
from var_fast.training.data.image_folder import ImageFolder, class_folders
from var_fast.training.data.source import ImageSource
from var_fast.training.data.tar_shards import TarShards

EXPECTED = "expected train/<class>/*.png, train-*.tar or train/*.tar in it"
MOST_SHARDS = 100_000


def open_images(path: str | Path, split: str, *, classes: list[str] | None = None) -> ImageSource | None:
    """The images of a split, "train" or "val"; None if there are others, but none of this split.

    path: a folder with train/<class>/... and val/<class>/..., a folder with train-*.tar or train/*.tar (and val), or
    the shards themselves, a pattern like shards/{000..099}.tar or shards/*.tar; these are the training split.
    classes: those of the training split, when `val` is opened; without, its own are taken. Names of classes of tar
    shards are read from classes.txt (a line each) or classes.json (a list) beside them.
    Raises UserError if there is no such data, and as ImageFolder and TarShards do.
    """
    text = os.fspath(path)
    if not os.path.isdir(text):
        shards = _expand(text)
        if split != "train":
            return None
        return TarShards(shards, classes or _class_file(os.path.dirname(shards[0])))
    shards = _shards_in(text, split)
    if shards:
        own = _class_file(os.path.dirname(shards[0])) or _class_file(text)
        return TarShards(shards, classes or own)
    if class_folders(os.path.join(text, split)):
        return ImageFolder(text, split, classes)
    if split != "train" and (_shards_in(text, "train") or class_folders(os.path.join(text, "train"))):
        return None
    if os.path.isfile(os.path.join(text, "index.json")):
        raise UserError(f"data: {text} is a token cache, expected images")
    inside = class_folders(text)
    hint = ""
    if inside and split not in inside:
        hint = f"; its folders ({', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}) belong below train/"
    raise UserError(f"data: {text} holds no training images: {EXPECTED}{hint}")


def _shards_in(folder: str, split: str) -> list[str]:
    here = glob.escape(folder)
    return sorted(glob.glob(f"{here}/{split}-*.tar")) or sorted(glob.glob(f"{here}/{split}/*.tar"))


def _expand(pattern: str) -> list[str]:
    """The files of a pattern: {00..12} and {a,b} first, then * and its like."""
    shards = []
    for name in _braces(pattern):
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not found or not os.path.isfile(found[0]):
            raise UserError(f"data: {name} does not exist, expected a folder of images or tar shards")
        shards += found
    return shards


def _braces(pattern: str) -> list[str]:
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        return [pattern]
    if found[3] is not None:
        inner = found[3].split(",")
    else:
        first, last = int(found[1]), int(found[2])
        if not first <= last < first + MOST_SHARDS:
            raise UserError(
                f"data: {pattern} has the range {found[0]}, expected one that grows, to {MOST_SHARDS} files"
            )
        inner = [str(number).zfill(len(found[1])) for number in range(first, last + 1)]
    return [name for part in inner for name in _braces(pattern[: found.start()] + part + pattern[found.end() :])]


def _class_file(folder: str) -> list[str] | None:
    """Class names from classes.txt or classes.json in `folder`, if one is there."""
    for name in ("classes.txt", "classes.json"):
        path = Path(folder, name)
        try:
            text = path.read_text(encoding="utf-8")
            classes = text.splitlines() if name.endswith("txt") else json.loads(text)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"data: cannot read {path}: {first_line(error)}") from None
        whole = isinstance(classes, list) and classes and all(isinstance(c, str) and c for c in classes)
        if not whole or len(set(classes)) < len(classes):
            raise UserError(f"data: {path} holds no class names, expected different ones, a line or list entry each")
        return classes
    return None
