"""gelu: bound by memory, so measured in bytes."""

from __future__ import annotations

import torch

from bench.case import Stage
from bench.ops.checks import TOLERANCE, check_close
from bench.ops.operator import Operator

SHAPES = {
    "small": [dict(B=2, L=30, C=64)],
    "quick": [dict(B=1, L=680, C=4096)],
    "full": [dict(B=64, L=680, C=4096)],
}


def make(shape, dtype, device, generator):
    return (torch.randn(*shape.values(), generator=generator, dtype=dtype, device=device),), {}


def work(shape, dtype, backward):
    """Forward: x in, y out. Backward: x and dy in, dx out."""
    B, L, C = shape.values()
    stages = [Stage(0, 2 * B * L * C * dtype.itemsize)]
    if backward:
        stages.append(Stage(0, 3 * B * L * C * dtype.itemsize))
    return stages


def compare(result, expected, dtype):
    check_close("y", result, expected, TOLERANCE[dtype])


OPERATORS = [Operator("gelu", SHAPES, make, work, compare, differentiable=(0,))]
