"""Smooth random pictures as an image source, without files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class FakePictures:
    """`count` pictures of 24 pixels in two classes; picture i is a function of (first, i)."""

    count: int
    first: int = 0

    @property
    def classes(self) -> list[str]:
        return ["even", "odd"]

    @property
    def labels(self) -> torch.Tensor:
        return torch.arange(self.count) % 2

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"picture {i}"

    def read(self, i: int) -> Image.Image:
        coarse = np.random.RandomState(self.first + i).randint(0, 256, (4, 4, 3)).astype(np.uint8)
        return Image.fromarray(coarse).resize((24, 24), Image.Resampling.BICUBIC)

    def fingerprint(self) -> str:
        return f"{self.first} {self.count}"
