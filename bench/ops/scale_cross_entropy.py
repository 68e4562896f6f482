"""scale_cross_entropy: the head's product, and what follows from it."""

from __future__ import annotations

import torch

from bench.case import Stage
from bench.ops.checks import TOLERANCE, check_all_close
from bench.ops.operator import Operator
from bench.ops.pyramids import PATCH_NUMS

SHAPES = {
    "small": [dict(B=2, L=30, C=64, V=128)],
    "quick": [dict(B=1, L=680, C=1024, V=4096)],
    "full": [dict(B=64, L=680, C=1024, V=4096)],
}


def make(shape, dtype, device, generator):
    """Every other token is a sure hit, so that the accuracy is a half and no rounding can change it: the right code's
    logit is made 16 larger. Token weights are about 1, as a loss scaler makes them: 1 / (B L V) is no float16."""

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    B, L, C, V = shape.values()
    weight_VC = draw(V, C) * C**-0.5
    target_BL = torch.randint(V, (B, L), generator=generator, device=device)
    h_BLC = draw(B, L, C)
    h_BLC[:, ::2] += 16 * weight_VC[target_BL[:, ::2]]
    token_weight_BL = 0.5 + torch.rand(B, L, generator=generator, dtype=dtype, device=device)
    options = dict(token_weight_BL=token_weight_BL, label_smoothing=0.1, patch_nums=PATCH_NUMS[L])
    return (h_BLC, weight_VC, 0.1 * draw(V), target_BL), options


def work(shape, dtype, backward):
    """Forward: h weight^T; h, weight, bias, token weights and 8-byte targets in, the loss and two numbers a scale out.
    Backward: two such products; the same in, dh, dweight, dbias out. The logits need not be stored."""
    B, L, C, V = shape.values()
    flops, parameters = 2 * B * L * C * V, V * C + V
    read = (B * L * C + parameters + B * L) * dtype.itemsize + 8 * B * L
    stages = [Stage(flops, read + (1 + 2 * len(PATCH_NUMS[L])) * dtype.itemsize)]
    if backward:
        stages.append(Stage(2 * flops, read + (B * L * C + parameters) * dtype.itemsize))
    return stages


def compare(result, expected, dtype):
    check_all_close(("loss", "loss by scale", "accuracy by scale"), result, expected, TOLERANCE[dtype])


OPERATORS = [Operator("scale_cross_entropy", SHAPES, make, work, compare, differentiable=(0, 1, 2))]
