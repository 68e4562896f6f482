"""From the bytes of a picture to RGB, and from levels to the numbers that the tokenizer works in."""

from __future__ import annotations

import os
import warnings
from typing import IO

import torch
from PIL import Image, ImageOps

from var_fast.checkpoint_files import first_line
from var_fast.images import FORMATS, to_rgb

# what counts as a picture, by the end of its name in lower case
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def decode(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """The picture as RGB, upright (EXIF), transparency laid over white.

    Raises OSError or ValueError for a picture that is corrupt, cut off or of absurd size (Pillow's limit).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as picture:
                return to_rgb(ImageOps.exif_transpose(picture))
    except (OSError, ValueError):
        raise
    except Exception as error:  # Pillow raises whatever the damaged bytes lead to
        raise ValueError(f"{type(error).__name__}: {first_line(error)}") from error


def to_float(images_u8: torch.Tensor) -> torch.Tensor:
    """uint8 pictures -> float32 in [-1, 1], the range the tokenizer works in."""
    return images_u8.float().div_(127.5).sub_(1.0)
