"""How a picture is cut to the model's size, as published (VAR, training of the tokenizer and the transformer)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from var_fast.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """The shorter side becomes round(enlarge * size) pixels (Lanczos); of that, a window of size x size is kept.

    flip: random windows are mirrored left to right half of the time. Windows are (3, size, size) uint8.
    """

    size: int
    enlarge: float = 1.125
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"size: got {self.size}, expected a positive number of pixels")
        if not 1.0 <= self.enlarge <= 16.0:
            raise UserError(f"enlarge: got {self.enlarge}, expected a number from 1 to 16")

    def random(self, picture: Image.Image, generator: torch.Generator) -> torch.Tensor:
        """A random window, every place alike."""
        flip, down, right = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        width, height = self._enlarged(picture)
        top = int(down * (height - self.size + 1))
        left = int(right * (width - self.size + 1))
        window = self._window(picture, top, left)
        return window.flip(-1) if self.flip and flip < 0.5 else window

    def centre(self, picture: Image.Image) -> torch.Tensor:
        """The window in the middle, for evaluation."""
        width, height = self._enlarged(picture)
        return self._window(picture, round((height - self.size) / 2), round((width - self.size) / 2))

    def _enlarged(self, picture: Image.Image) -> tuple[int, int]:
        """Width and height that the whole picture would have."""
        short = round(self.enlarge * self.size)
        width, height = picture.size
        return (short, short * height // width) if width <= height else (short * width // height, short)

    def _window(self, picture: Image.Image, top: int, left: int) -> torch.Tensor:
        """The window of the enlarged picture, of which nothing else is computed: a long one would fill the memory."""
        width, height = self._enlarged(picture)
        across, down = picture.width / width, picture.height / height
        right, bottom = left + self.size, top + self.size
        box = (left * across, top * down, min(right * across, picture.width), min(bottom * down, picture.height))
        window = picture.resize((self.size, self.size), Image.Resampling.LANCZOS, box=box)
        return torch.from_numpy(np.asarray(window).transpose(2, 0, 1).copy())
