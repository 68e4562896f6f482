"""codebook_search against a float64 search; it may differ only where two codes are equally near in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.ops import codebook_search


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 33), st.booleans(), st.integers(0, 2**16))
def test_nearest_code(N, V, C, cosine, seed):
    g = torch.Generator().manual_seed(seed)
    z_NC, codebook_VC = torch.randn(N, C, generator=g), torch.randn(V, C, generator=g)
    idx_N = codebook_search(z_NC, codebook_VC, cosine)
    assert idx_N.dtype == torch.int64 and idx_N.shape == (N,)
    z, codebook = z_NC.double(), codebook_VC.double()
    if cosine:
        distance_NV = 1 - F.normalize(z, dim=-1) @ F.normalize(codebook, dim=-1).T
    else:
        distance_NV = (z[:, None] - codebook[None]).square().sum(-1)
    chosen_N = distance_NV.gather(1, idx_N[:, None]).squeeze(1)
    magnitude_N = 1 if cosine else z.square().sum(1) + codebook.square().sum(1).max()
    assert (chosen_N <= distance_NV.min(1).values + 2e-6 * magnitude_N).all()


@pytest.mark.parametrize("cosine", [False, True])
def test_lowest_index_wins_a_tie(cosine):
    codebook_VC = torch.tensor([[0.0, 3.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert codebook_search(torch.tensor([[1.0, 0.0]]), codebook_VC, cosine).tolist() == [1]


def test_cosine_ignores_length():
    codebook_VC = torch.tensor([[100.0, 0.0], [0.6, 0.8]])
    z_NC = torch.tensor([[0.5, 0.1]])
    assert codebook_search(z_NC, codebook_VC, cosine=True).tolist() == [0]
    assert codebook_search(z_NC, codebook_VC).tolist() == [1]


def test_no_gradient():
    idx_N = codebook_search(torch.randn(3, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True))
    assert not idx_N.requires_grad


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="codebook_VC"):
        codebook_search(torch.zeros(3, 2), torch.zeros(4, 3))
