"""codebook_search: one product and an argmin over it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.case import Stage, Wrong
from bench.ops.operator import Operator
from var_fast.ops import codebook_search_reference

SHAPES = {
    "small": [dict(B=2, L=30, C=8, V=64)],
    "quick": [dict(B=1, L=680, C=32, V=4096)],
    "full": [dict(B=64, L=680, C=32, V=4096)],
}


def make(shape, dtype, device, generator):
    B, L, C, V = shape.values()
    z_NC = torch.randn(B * L, C, generator=generator, dtype=dtype, device=device)
    return (z_NC, make_codebook(V, C, dtype, device, generator)), {}


def make_codebook(V, C, dtype, device, generator):
    """Codes of all lengths, as a trained codebook has them: the short ones serve late scales, whose rests are small."""
    length_V1 = torch.rand(V, 1, generator=generator, dtype=dtype, device=device)
    return torch.randn(V, C, generator=generator, dtype=dtype, device=device) * length_V1


def work(shape, dtype, backward):
    """z codebook^T; z and codebook in, 8-byte indices out. The distances need not be stored."""
    B, L, C, V = shape.values()
    return [Stage(2 * B * L * V * C, (B * L + V) * C * dtype.itemsize + 8 * B * L)]


class Search(NamedTuple):
    """A search in float64: its inputs too, so that another answer can be told from a wrong one."""

    z_NC: torch.Tensor
    codebook_VC: torch.Tensor
    idx_N: torch.Tensor

    def distance(self, idx_N):
        return (self.z_NC - self.codebook_VC[idx_N]).square().sum(1)


def exact(z_NC, codebook_VC):
    return Search(z_NC, codebook_VC, codebook_search_reference(z_NC, codebook_VC))


def check_nearest(what: str, idx_N: torch.Tensor, search: Search, dtype: torch.dtype) -> None:
    """Raises Wrong unless each index is float64's, or names a code as near as that to the rounding of `dtype`: of
    distances of the size |z|^2 + |code|^2, some 16 units in the last place."""
    V = len(search.codebook_VC)
    if idx_N.dtype != torch.int64 or idx_N.shape != search.idx_N.shape:
        raise Wrong(f"{what} is {tuple(idx_N.shape)} {idx_N.dtype}, expected {tuple(search.idx_N.shape)} int64")
    if idx_N.min() < 0 or idx_N.max() >= V:
        raise Wrong(f"{what} has indices from {idx_N.min().item()} to {idx_N.max().item()}, expected 0 to {V - 1}")
    size_N = search.z_NC.square().sum(1) + search.codebook_VC.square().sum(1).max()
    farther_N = search.distance(idx_N) - search.distance(search.idx_N)
    wrong_N = (idx_N != search.idx_N) & ~(farther_N <= 16 * torch.finfo(dtype).eps * size_N)
    if wrong_N.any():
        raise Wrong(f"{what}: {int(wrong_N.sum())} of {len(idx_N)} indices are not those of the nearest codes")


def compare(result, expected, dtype):
    check_nearest("idx", result, expected, dtype)


OPERATORS = [Operator("codebook_search", SHAPES, make, work, compare, exact=exact, float32_only=True)]
