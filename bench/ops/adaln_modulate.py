"""adaln_modulate and residual_adaln_modulate: bound by memory, so measured in bytes."""

from __future__ import annotations

import torch

from bench.case import Stage
from bench.ops.checks import TOLERANCE, check_all_close, check_close
from bench.ops.operator import Operator

SHAPES = {
    "small": [dict(B=2, L=30, C=64)],
    "quick": [dict(B=1, L=680, C=1024)],
    "full": [dict(B=64, L=680, C=1024), dict(B=32, L=680, C=1920)],
}


def _make(shape, dtype, device, generator, maps, rows):
    def draw(*size):
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    B, L, C = shape.values()
    return (*(draw(B, L, C) for _ in range(maps)), *(draw(B, C) for _ in range(rows))), {}


def make(shape, dtype, device, generator):
    return _make(shape, dtype, device, generator, maps=1, rows=2)


def make_residual(shape, dtype, device, generator):
    return _make(shape, dtype, device, generator, maps=2, rows=3)


def _stages(shape, dtype, backward, forward_maps, forward_rows, backward_maps, backward_rows):
    """Bytes from how many (B, L, C) maps and (B, C) rows are read and written; no matrix products."""
    B, L, C = shape.values()
    row = B * C * dtype.itemsize
    stages = [Stage(0, (forward_maps * L + forward_rows) * row)]
    if backward:
        stages.append(Stage(0, (backward_maps * L + backward_rows) * row))
    return stages


def work(shape, dtype, backward):
    """Forward: x, scale, shift in, y out. Backward: x, dy, scale in, dx, dscale, dshift out."""
    return _stages(shape, dtype, backward, 2, 2, 3, 3)


def work_residual(shape, dtype, backward):
    """Forward: x, branch, gate, scale, shift in, x', y out. Backward: x', branch, dx', dy, gate, scale in, dx, dbranch,
    dgate, dscale, dshift out."""
    return _stages(shape, dtype, backward, 4, 3, 6, 5)


def compare(result, expected, dtype):
    check_close("y", result, expected, TOLERANCE[dtype])


def compare_residual(result, expected, dtype):
    check_all_close(("x", "y"), result, expected, TOLERANCE[dtype])


ALL_FIVE = (0, 1, 2, 3, 4)
OPERATORS = [
    Operator("adaln_modulate", SHAPES, make, work, compare, differentiable=(0, 1, 2)),
    Operator(
        "residual_adaln_modulate",
        SHAPES,
        make_residual,
        work_residual,
        compare_residual,
        differentiable=ALL_FIVE,
    ),
]
