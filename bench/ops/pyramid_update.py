"""pyramid_update: one step of sampling between two scales, some small tensors through several small kernels."""

from __future__ import annotations

import torch

from bench.case import Stage
from bench.ops import codebook_search
from bench.ops.checks import TOLERANCE, check_all_close
from bench.ops.operator import Operator

SHAPES = {
    "small": [dict(B=2, C=8, h=4, w=4, V=64, pn=2, pn_next=3)],
    "quick": [dict(B=1, C=32, h=16, w=16, V=4096, pn=10, pn_next=13)],
    "full": [dict(B=64, C=32, h=16, w=16, V=4096, pn=10, pn_next=13)],
}


def make(shape, dtype, device, generator):
    def draw(*size):
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    B, C, h, w, V, pn, pn_next = shape.values()
    idx_Bl = torch.randint(V, (B, pn * pn), generator=generator, device=device)
    codebook_VC = codebook_search.make_codebook(V, C, dtype, device, generator)
    phi_weight, phi_bias = draw(C, C, 3, 3) * (9 * C) ** -0.5, draw(C) * (9 * C) ** -0.5
    return (idx_Bl, codebook_VC, phi_weight, phi_bias, 0.5, draw(B, C, h, w), pn, pn_next), {}


def work(shape, dtype, backward):
    """phi's 3x3 convolution; interpolation is not counted. 8-byte indices, their codes, phi and f_hat in, f_hat and
    the next map out. The copy of f_hat that each call of the benchmark makes (`in_place`) is not counted."""
    B, C, h, w, V, pn, pn_next = shape.values()
    layer = 9 * C * C
    elements = B * C * (pn * pn + 2 * h * w + pn_next * pn_next) + layer + C
    return [Stage(2 * B * h * w * layer, elements * dtype.itemsize + 8 * B * pn * pn)]


def compare(result, expected, dtype):
    check_all_close(("the next map", "f_hat"), result, expected, TOLERANCE[dtype])


OPERATORS = [Operator("pyramid_update", SHAPES, make, work, compare, in_place=(5,), float32_only=True)]
