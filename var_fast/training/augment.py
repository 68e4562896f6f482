"""Random flips, shifts and zooms: few pictures, so each has to be seen in more than one way."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def random_flip(img_B3HW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each picture left to right with probability one half."""
    flip_B = torch.rand(img_B3HW.shape[0], generator=generator) < 0.5
    return torch.where(flip_B[:, None, None, None], img_B3HW.flip(-1), img_B3HW)


def _crop(img_B3HW: torch.Tensor, size: int, margin: int, generator: torch.Generator) -> torch.Tensor:
    """A random size x size window of each picture, up to `margin` pixels over its edge; white (1.0) lies outside."""
    batch = img_B3HW.shape[0]
    pad = max(0, size - img_B3HW.shape[-1]) + margin
    padded = F.pad(img_B3HW, (pad, pad, pad, pad), value=1.0)
    # Valid first corners: the window overhangs by at most the margin, and a picture smaller than it stays inside.
    low, high = sorted((0, img_B3HW.shape[-1] - size))
    corner_B2 = torch.randint(low - margin, high + margin + 1, (batch, 2), generator=generator) + pad
    span = torch.arange(size)
    y_BH, x_BW = corner_B2[:, :1] + span, corner_B2[:, 1:] + span
    b = torch.arange(batch)[:, None, None, None]
    c = torch.arange(3)[None, :, None, None]
    return padded[b, c, y_BH[:, None, :, None], x_BW[:, None, None, :]]


def shift_zoom(
    img_B3HW: torch.Tensor,
    size: int,
    generator: torch.Generator,
    *,
    zoom: tuple[float, float] = (0.85, 1.3),
    shift: int = 2,
) -> torch.Tensor:
    """Scale the batch to one random size in `zoom` times `size` and cut a random size x size window from each picture.

    img_B3HW: in [-1, 1], white background; may be larger than `size`, which keeps enlarged details real.
    """
    low, high = zoom
    factor = low + (high - low) * float(torch.rand((), generator=generator))
    side = max(1, round(size * factor))
    scaled = F.interpolate(img_B3HW, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return _crop(scaled, size, shift, generator)
