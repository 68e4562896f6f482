"""Suite `sample`: from labels to images, the tokenizer's decoder included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.case import Case, Wrong
from bench.models import Models
from bench.suites.checks import relative_error
from bench.work import sample_work

INPUT_SETS = 4


@dataclass(frozen=True)
class SampleSubject:
    """Options of the call; the inputs are (labels (B,) int64, seeds (B,) int64), one seed for each image."""

    models: Models
    cfg: float = 1.5
    top_k: int = 900
    top_p: float = 0.96


def cases(models: Models, device: torch.device, dtypes: Sequence[torch.dtype], batch: int) -> list[Case]:
    """One case for each dtype. Images are as large as the model makes them, results are (B, 3, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(batch)
    inputs = [
        (
            torch.randint(models.var.num_classes, (batch,), generator=generator).to(device),
            torch.randint(2**31, (batch,), generator=generator).to(device),
        )
        for _ in range(INPUT_SETS)
    ]
    return [
        Case(
            suite="sample",
            name=models.name,
            device=device,
            dtype=dtype,
            batch=batch,
            images=batch,
            work=sample_work(models.vae, models.var, batch, dtype.itemsize),
            inputs=inputs,
            subject=SampleSubject(models),
            check=_same_images if dtype == torch.float32 else _alike,
        )
        for dtype in dtypes
    ]


def _same_images(images: torch.Tensor, expected: torch.Tensor) -> None:
    error = relative_error(images, expected)
    if not error <= 1e-4:
        raise Wrong(f"the images differ from the reference's by {error:.1e}, more than 1e-4")


def _alike(images: torch.Tensor, expected: torch.Tensor) -> None:
    # One token drawn differently changes all that follow, so images of a half type cannot be held to float32's. Whether
    # the tokens agree is measured by the quality gate, scale by scale.
    if not images.isfinite().all() or images.min() < 0 or images.max() > 1:
        raise Wrong("the images are not within [0, 1]")
    shift = abs(images.float().mean() - expected.float().mean()).item()
    spread = (images.float().std() / expected.float().std()).item()
    if shift > 0.05 or not 0.8 < spread < 1.25:
        raise Wrong(f"the images are unlike the reference's: mean off by {shift:.2f}, deviation {spread:.2f} times")
