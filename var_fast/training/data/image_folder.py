"""Images in a folder per class: root/train/<class>/**/*.png and root/val/<class>/... (the ImageFolder layout)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image

from var_fast.errors import UserError
from var_fast.training.data.pixels import SUFFIXES, decode
from var_fast.training.data.source import Strings, fingerprint


class ImageFolder:
    """One split of the layout, in the order of class and path; the class names are those of the folders, sorted.

    classes: those of the training split, for the labels of another one. Names that begin with a dot are left out.
    Raises UserError for a folder that cannot be read, that has no class folders or pictures, for a class without
    pictures, and for one that is not among `classes`.
    """

    def __init__(self, root: str | Path, split: str, classes: list[str] | None = None):
        self.folder = os.path.join(root, split)
        found = class_folders(self.folder)
        if not found:
            raise UserError(f"data: {self.folder} has no folder for each class, expected {split}/<class>/*.png")
        unknown = set(found).difference(found if classes is None else classes)
        if unknown:
            raise UserError(
                f"data: {self.folder} has the class {min(unknown)!r}, which the training images lack: expected only "
                f"their {len(classes)} classes"
            )
        self.classes = found if classes is None else list(classes)
        paths: list[str] = []
        labels: list[int] = []
        numbers = {name: number for number, name in enumerate(self.classes)}
        for name in found:
            pictures = _pictures(os.path.join(self.folder, name))
            if not pictures and classes is None:
                raise UserError(f"data: {os.path.join(self.folder, name)} holds no pictures, expected some of a class")
            paths += (os.path.join(name, picture) for picture in pictures)
            labels += [numbers[name]] * len(pictures)
        if not paths:
            raise UserError(f"data: {self.folder} holds no pictures ({', '.join(SUFFIXES)})")
        self.labels = torch.tensor(labels)
        self._paths = Strings(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, i: int) -> str:
        return os.path.join(self.folder, self._paths[i])

    def read(self, i: int) -> Image.Image:
        return decode(self.name(i))

    def fingerprint(self) -> str:
        return fingerprint(self._paths, self.labels, self.classes)


def class_folders(folder: str | Path) -> list[str]:
    """The sorted names of the folders in `folder`, [] if there is no such folder. Raises UserError if it is closed."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"data: cannot read {folder}: {error.strerror}") from None


def _pictures(folder: str) -> list[str]:
    """Paths of all pictures below `folder`, from there, sorted."""

    def refuse(error: OSError) -> None:
        raise UserError(f"data: cannot read {error.filename}: {error.strerror}") from None

    found = []
    for where, inner, files in os.walk(folder, followlinks=True, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith(".")]
        below = os.path.relpath(where, folder)
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append(name if below == "." else os.path.join(below, name))
    return sorted(found)
