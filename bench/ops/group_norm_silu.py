"""group_norm_silu: channels last, as the tokenizer's convolutions are fastest; bound by memory."""

from __future__ import annotations

import torch

from bench.case import Stage
from bench.ops.checks import TOLERANCE, check_close
from bench.ops.operator import Operator

SHAPES = {
    "small": [dict(B=2, C=64, h=8, w=8)],
    "quick": [dict(B=1, C=160, h=128, w=128)],
    "full": [dict(B=16, C=160, h=256, w=256), dict(B=64, C=640, h=16, w=16)],
}


def make(shape, dtype, device, generator):
    def draw(*size):
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    B, C, h, w = shape.values()
    x_BChw = draw(B, C, h, w).to(memory_format=torch.channels_last)
    return (x_BChw, 1 + 0.3 * draw(C), 0.3 * draw(C)), {}


def work(shape, dtype, backward):
    """No products. Forward: x, weight, bias in, y out: read once, as if a group stayed on chip between its statistics
    and its use. Backward: x, dy, weight, bias in, dx, dweight, dbias out."""
    B, C, h, w = shape.values()
    pixels = B * C * h * w
    stages = [Stage(0, (2 * pixels + 2 * C) * dtype.itemsize)]
    if backward:
        stages.append(Stage(0, (3 * pixels + 4 * C) * dtype.itemsize))
    return stages


def compare(result, expected, dtype):
    check_close("y", result, expected, TOLERANCE[dtype])


OPERATORS = [Operator("group_norm_silu", SHAPES, make, work, compare, differentiable=(0, 1, 2))]
