"""Suite `tokenize`: image -> tokens, and image -> tokens -> image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.case import Case, Wrong
from bench.models import Models
from bench.suites.checks import relative_error
from bench.work import tokenize_work

INPUT_SETS = 2


@dataclass(frozen=True)
class TokenizeSubject:
    """The input is (images (B, 3, H, W) in [-1, 1],). `decode`: the result is the images made again, else tokens."""

    models: Models
    decode: bool


def cases(models: Models, device: torch.device, dtypes: Sequence[torch.dtype], batch: int, decode: bool) -> list[Case]:
    """One case for each dtype, with smooth random images."""
    generator = torch.Generator().manual_seed(batch)
    side = models.vae.quantize.v_patch_nums[-1] * models.vae.downsample
    inputs = []
    for _ in range(INPUT_SETS):
        coarse = torch.rand(batch, 3, side // 8, side // 8, generator=generator) * 2 - 1
        image = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
        inputs.append((image.to(device),))
    return [
        Case(
            suite="tokenize",
            name=f"{models.name} image to {'image' if decode else 'tokens'}",
            device=device,
            dtype=dtype,
            batch=batch,
            images=batch,
            work=tokenize_work(models.vae, batch, dtype.itemsize, decode),
            inputs=inputs,
            subject=TokenizeSubject(models, decode),
            check=_image_check(dtype) if decode else _token_check(dtype),
        )
        for dtype in dtypes
    ]


def _token_check(dtype: torch.dtype):
    # A code whose distance ties with another's to the last bit may come out differently, and every later scale codes
    # what that one left over; in a half type the encoder's rounding flips many more.
    least = 0.999 if dtype == torch.float32 else 0.5

    def check(result, expected) -> None:
        same = (torch.cat(list(result), dim=1) == torch.cat(list(expected), dim=1)).float().mean().item()
        if not same >= least:
            raise Wrong(f"{100 * same:.1f}% of the tokens are the reference's, expected {100 * least:.1f}% or more")

    return check


def _image_check(dtype: torch.dtype):
    most = 1e-4 if dtype == torch.float32 else 0.1

    def check(result, expected) -> None:
        error = relative_error(result, expected)
        if not error <= most:
            raise Wrong(f"the images differ from the reference's by {error:.1e}, more than {most:.0e}")

    return check
