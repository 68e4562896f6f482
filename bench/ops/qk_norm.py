"""qk_norm: bound by memory, so measured in bytes."""

from __future__ import annotations

import torch

from bench.case import Stage
from bench.ops.checks import TOLERANCE, check_all_close
from bench.ops.operator import Operator

SHAPES = {
    "small": [dict(B=2, L=30, H=2, D=32)],
    "quick": [dict(B=1, L=680, H=16, D=64)],
    "full": [dict(B=64, L=680, H=16, D=64), dict(B=32, L=680, H=30, D=64)],
}


def make(shape, dtype, device, generator):
    B, L, H, D = shape.values()
    qkv_BL3HD = torch.randn(B, L, 3, H, D, generator=generator, dtype=dtype, device=device)
    # a model starts at 4; training moves it apart by head
    scale_H = 3 + 2 * torch.rand(H, generator=generator, dtype=dtype, device=device)
    return (qkv_BL3HD, scale_H), {}


def work(shape, dtype, backward):
    """Forward: q, k, scale in, q, k out; v is a view and moves nothing. Backward: q, k, scale and three gradients in,
    the packed gradient and dscale out."""
    B, L, H, D = shape.values()
    part = B * L * H * D
    stages = [Stage(0, (4 * part + H) * dtype.itemsize)]
    if backward:
        stages.append(Stage(0, (8 * part + 2 * H) * dtype.itemsize))
    return stages


def compare(result, expected, dtype):
    check_all_close(("q", "k", "v"), result, expected, TOLERANCE[dtype])


OPERATORS = [Operator("qk_norm", SHAPES, make, work, compare, differentiable=(0, 1))]
