"""multiscale_quantize: a search and a convolution at each scale, on data that fits on chip."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.case import Stage, Wrong
from bench.ops import codebook_search
from bench.ops.checks import TOLERANCE, check_close
from bench.ops.operator import Operator
from bench.ops.pyramids import PATCH_NUMS
from var_fast.models.phi import build_phi
from var_fast.ops.multiscale_quantize import area_down, bicubic_up, scale_position

PHI_LAYERS = 4
SHAPES = {
    "small": [dict(B=2, L=30, C=8, V=64)],
    "quick": [dict(B=1, L=680, C=32, V=4096)],
    "full": [dict(B=64, L=680, C=32, V=4096)],
}


def make(shape, dtype, device, generator):
    B, L, C, V = shape.values()
    f_BChw = torch.randn(B, C, *2 * PATCH_NUMS[L][-1:], generator=generator, dtype=dtype, device=device)
    codebook_VC = codebook_search.make_codebook(V, C, dtype, device, generator)
    phi = build_phi(C, 0.5, PHI_LAYERS, len(PATCH_NUMS[L])).to(device, dtype).requires_grad_(False)
    for parameter in phi.parameters():
        parameter.uniform_(-((9 * C) ** -0.5), (9 * C) ** -0.5, generator=generator)
    return (f_BChw, codebook_VC, phi.__getitem__, PATCH_NUMS[L]), {}


def work(shape, dtype, backward):
    """A search and a 3x3 convolution of C channels at each scale; interpolation is not counted. f, codebook and the
    layers of phi in, f_hat and 8-byte indices out."""
    B, L, C, V = shape.values()
    pixels, layer = PATCH_NUMS[L][-1] ** 2, 9 * C * C
    flops = 2 * B * (L * V * C + len(PATCH_NUMS[L]) * pixels * layer)
    elements = 2 * B * C * pixels + V * C + PHI_LAYERS * (layer + C)
    return [Stage(flops, elements * dtype.itemsize + 8 * B * L)]


class Pyramid(NamedTuple):
    """The operator's arguments in float64."""

    f_BChw: torch.Tensor
    codebook_VC: torch.Tensor
    phi: Callable[[float], Callable[[torch.Tensor], torch.Tensor]]
    patch_nums: tuple[int, ...]


def exact(f_BChw, codebook_VC, phi, patch_nums):
    return Pyramid(f_BChw, codebook_VC, copy.deepcopy(phi.__self__).double().__getitem__, patch_nums)


def compare(result, expected, dtype):
    """Where two codes are equally near, either is right, but each leaves another rest, and so other indices at all
    later scales. So no list of indices is compared: each scale is held to the float64 search of the rest that the
    result's own earlier indices leave, and f_hat to the float64 sum of its own codes."""
    idx_per_scale, f_hat_BChw = result
    f_BChw, codebook_VC, phi, patch_nums = expected
    if len(idx_per_scale) != len(patch_nums):
        raise Wrong(f"{len(idx_per_scale)} scales, expected {len(patch_nums)}")
    B, C, h, w = f_BChw.shape
    sum_BChw = torch.zeros_like(f_BChw)
    for si, (pn, idx_Bl) in enumerate(zip(patch_nums, idx_per_scale)):
        z_NC = area_down(f_BChw - sum_BChw, (pn, pn)).permute(0, 2, 3, 1).reshape(-1, C)
        search = codebook_search.exact(z_NC, codebook_VC)
        codebook_search.check_nearest(f"scale {si}", idx_Bl.flatten(), search, dtype)
        h_BCpp = F.embedding(idx_Bl.view(B, -1), codebook_VC).transpose(1, 2).reshape(B, C, pn, pn)
        sum_BChw = sum_BChw + phi(scale_position(si, len(patch_nums)))(bicubic_up(h_BCpp, (h, w)))
    check_close("f_hat", f_hat_BChw, sum_BChw, TOLERANCE[dtype])


OPERATORS = [Operator("multiscale_quantize", SHAPES, make, work, compare, exact=exact, float32_only=True)]
