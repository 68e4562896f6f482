"""sample_tokens: two rows of logits in, one index out."""

from __future__ import annotations

import torch

from bench.case import Stage, Wrong
from bench.ops.operator import Operator

SHAPES = {
    "small": [dict(B=2, l=9, V=128)],
    "quick": [dict(B=1, l=256, V=4096)],
    "full": [dict(B=64, l=256, V=4096)],
}


def make(shape, dtype, device, generator):
    B, l, V = shape.values()
    cond, uncond = (3 * torch.randn(B, l, V, generator=generator, dtype=dtype, device=device) for _ in range(2))
    seed_B = torch.arange(B, device=device)
    # the published defaults; guidance at the last scale is cfg itself
    return (cond, uncond, 1.5, min(900, V // 4), 0.96, seed_B, 9), {}


def work(shape, dtype, backward):
    """No products. Two rows of logits and an image's seed in, an 8-byte index out."""
    B, l, V = shape.values()
    return [Stage(0, B * (l * (2 * V * dtype.itemsize + 8) + 8))]


def compare(result, expected, dtype):
    """Equal: every backend computes in float64 whatever the type of the logits, which is exact in it."""
    if result.dtype != torch.int64 or result.shape != expected.shape:
        raise Wrong(f"idx is {tuple(result.shape)} {result.dtype}, expected {tuple(expected.shape)} int64")
    if different := int((result != expected).sum()):
        raise Wrong(f"{different} of {expected.numel()} indices differ")


OPERATORS = [Operator("sample_tokens", SHAPES, make, work, compare)]
