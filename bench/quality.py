"""The quality gate: how far each fast mode strays from the float32 reference, on the demo model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from bench.backends import use_backend
from var_fast import Sampler, load_checkpoint
from var_fast.engine.options import SamplingOptions, final_image
from var_fast.models import VAR

ONE_STEP = 1 / 255  # images that differ by less everywhere are the same picture in 8 bits, give or take the rounding


NOTHING: dict[str, Any] = {  # what a mode has measured before it has run
    "token_agreement": None,
    "agreement_per_scale": [],
    "images_identical": 0,
    "images": 0,
    "psnr_same_tokens_db": None,
    "psnr_free_db": None,
    "skipped": None,
}


class Mode(NamedTuple):
    """`dtype` and `backend` as Sampler and VAR_FAST_BACKEND take them."""

    name: str
    dtype: str
    backend: str


class Run(NamedTuple):
    tokens: list[torch.Tensor]  # of every scale, (B, l)
    img_B3HW: torch.Tensor  # in [0, 1]; of the tokens that were followed


def quality_rows(
    modes: Sequence[tuple[str, str, str]],
    labels: Sequence[int],
    seeds: Sequence[int],
    device: torch.device | str,
) -> list[dict[str, Any]]:
    """A row for each mode (name, dtype, backend), measured on one image for each label and seed.

    `token_agreement`: of the mode's tokens with the reference's where both have seen the reference's earlier scales
    and draw with the same random numbers; also for each scale. `psnr_same_tokens_db`: of the image that the mode
    decodes from the reference's tokens, what the decoder alone changes. `psnr_free_db`, `images_identical`: of the
    images that the mode makes on its own, where one other token early on makes another, no worse image. PSNR is over
    all images at once, for values in [0, 1]; None: not one bit differs. `skipped`: why a mode has no numbers.
    """
    var = load_checkpoint("demo").var
    with use_backend("reference"), _exact_float32():
        sampler = Sampler(var, dtype="float32", device=device)
        reference = follow(sampler, labels, seeds)
    rows = []
    for mode in map(Mode._make, modes):
        row: dict[str, Any] = {"mode": mode.name, "dtype": mode.dtype} | NOTHING
        try:
            with use_backend(mode.backend):
                row |= _compare(var, mode, labels, seeds, reference)
        except Exception as error:  # a mode that fails must not cost the others their row
            reason = str(error).strip().splitlines()
            row["skipped"] = reason[0] if reason else type(error).__name__
        rows.append(row)
    return rows


@torch.no_grad()
def follow(
    sampler: Sampler, labels: Sequence[int], seeds: Sequence[int], lead: Sequence[torch.Tensor] | None = None
) -> Run:
    """The tokens that the sampler draws with its own options. `lead`: tokens of every
    scale that are followed instead of those drawn, so that a difference does not grow from scale to scale."""
    label_B, seed_B = (torch.tensor(list(values), device=sampler.device) for values in (labels, seeds))
    drawn: list[torch.Tensor] = []

    def keep(si, idx_Bl, codes_BlC):
        drawn.append(idx_Bl.clone())
        return (idx_Bl if lead is None else lead[si]), None

    steps = sampler.loop.steps(label_B, seed_B, SamplingOptions(), keep)
    return Run(drawn, final_image(steps, len(sampler.var.patch_nums)))


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Peak signal-to-noise ratio of values in [0, 1]; None where nothing differs. Raises ValueError for NaN."""
    error = (a.double() - b.double()).square().mean().item()
    if not math.isfinite(error):
        raise ValueError("the images are not finite")
    return None if error == 0 else -10 * math.log10(error)


def _compare(var: VAR, mode: Mode, labels, seeds, reference: Run) -> dict[str, Any]:
    sampler = Sampler(var, dtype=mode.dtype)
    run = follow(sampler, labels, seeds, lead=reference.tokens)
    same_per_scale = [(own == other).float() for own, other in zip(run.tokens, reference.tokens, strict=True)]
    free = sampler.sample(labels, seeds)
    furthest_B = (free - reference.img_B3HW).abs().flatten(1).amax(1)
    return {
        "dtype": str(sampler.dtype).removeprefix("torch."),  # of "auto", what it came to
        "token_agreement": torch.cat(same_per_scale, dim=1).mean().item(),
        "agreement_per_scale": [same_Bl.mean().item() for same_Bl in same_per_scale],
        "images": len(labels),
        "images_identical": int((furthest_B < ONE_STEP).sum()),
        "psnr_same_tokens_db": psnr_db(run.img_B3HW, reference.img_B3HW),
        "psnr_free_db": psnr_db(free, reference.img_B3HW),
    }


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Without TF32, which cuDNN's convolutions use if left alone."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
