"""Pictures to evaluate on: those of a folder, or of a split of training data."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image

from var_fast.errors import UserError
from var_fast.training.data import ImageSource, open_images
from var_fast.training.data.image_folder import _pictures
from var_fast.training.data.pixels import SUFFIXES, decode


class PictureFolder:
    """All pictures below a folder, at any depth, in the order of their paths; an ImageSource of one class.

    Names that begin with a dot are left out. Raises UserError if there is no such folder, or no picture in it.
    """

    def __init__(self, folder: str | Path):
        if not os.path.isdir(folder):
            raise UserError(f"{folder} does not exist, expected a folder of pictures")
        self._paths = [os.path.join(folder, name) for name in _pictures(os.fspath(folder))]
        if not self._paths:
            raise UserError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
        self.classes, self.labels = [""], torch.zeros(len(self._paths), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, i: int) -> str:
        return self._paths[i]

    def read(self, i: int) -> Image.Image:
        return decode(self._paths[i])


def open_pictures_of(data: str | Path, split: str) -> ImageSource | PictureFolder:
    """The pictures of `split` ("train" or "val") where `data` has train/ or val/ or tar shards, else all below it.

    Raises UserError if there are none.
    """
    if split not in ("train", "val"):
        raise UserError(f"split is {split!r}, expected train or val")
    if os.path.isdir(data):
        try:
            with os.scandir(data) as entries:
                plain = not any(e.name.endswith(".tar") or (e.name in ("train", "val") and e.is_dir()) for e in entries)
        except OSError as error:
            raise UserError(f"cannot read {data}: {error.strerror}") from None
        if plain:
            return PictureFolder(data)
    source = open_images(data, split)
    if source is None:
        raise UserError(f"{data} has no split {split!r}, expected --split train")
    return source
