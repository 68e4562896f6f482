"""scale_attention: bound by products; only the pairs that the mask allows are counted."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from bench.case import Stage
from bench.ops.checks import TOLERANCE, check_close
from bench.ops.operator import Operator
from bench.ops.pyramids import PATCH_NUMS, allowed_pairs
from var_fast.ops import scale_attention_reference

MOST_SCORES = 2**29  # 4 GiB of float64
SHAPES = {
    "small": [dict(B=2, L=30, H=2, D=32)],
    "quick": [dict(B=1, L=680, H=16, D=64)],
    "full": [
        *(dict(B=16, L=L, H=H, D=64) for L in (680, 2240) for H in (16, 30)),
        *(dict(B=4, L=L, H=H, D=64) for L in (680, 2240, 9451) for H in (20, 24, 30, 36)),
    ],
}


def make(shape, dtype, device, generator):
    """Queries and keys as without L2 normalisation; it would leave nearly uniform weights, which hide errors."""
    B, L, H, D = shape.values()
    q, k, v = (torch.randn(B, L, H, D, generator=generator, dtype=dtype, device=device) for _ in range(3))
    return (q, k, v, PATCH_NUMS[L], D**-0.5), {}


def work(shape, dtype, backward):
    """Forward: q k^T and p v, 2 D operations each a pair; q, k, v in, o out. Backward: five such products in place of
    two; q, k, v, o, do in, dq, dk, dv out."""
    B, L, H, D = shape.values()
    flops, part = 4 * D * B * H * allowed_pairs(L), B * L * H * D * dtype.itemsize
    stages = [Stage(flops, 4 * part)]
    if backward:
        stages.append(Stage(2.5 * flops, 8 * part))
    return stages


def exact(q_BLHD, k_BLHD, v_BLHD, patch_nums, softmax_scale):
    """The reference, some heads at a time: a GPU's float64 attention stores the scores, and those of all heads do not
    fit at L = 9451."""
    B, L = q_BLHD.shape[:2]
    heads = max(1, MOST_SCORES // (B * L * L))
    parts = [
        checkpoint(scale_attention_reference, *qkv, patch_nums, softmax_scale, use_reentrant=False)
        for qkv in zip(*(t.split(heads, dim=2) for t in (q_BLHD, k_BLHD, v_BLHD)))
    ]
    return torch.cat(parts, dim=2)


def compare(result, expected, dtype):
    check_close("o", result, expected, TOLERANCE[dtype])


OPERATORS = [Operator("scale_attention", SHAPES, make, work, compare, differentiable=(0, 1, 2), exact=exact)]
