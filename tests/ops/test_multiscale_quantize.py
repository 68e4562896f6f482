"""multiscale_quantize: properties of a residual pyramid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.models.phi import build_phi
from var_fast.ops import multiscale_quantize

pyramids = st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True).map(sorted)


@settings(deadline=None, max_examples=20)
@given(pyramids, st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
def test_each_scale_codes_what_the_earlier_ones_left(patch_nums, B, cosine, seed):
    g = torch.Generator().manual_seed(seed)
    C, side = 8, patch_nums[-1]
    f = torch.randn(B, C, side, side, generator=g, dtype=torch.float64)
    codebook = torch.randn(11, C, generator=g, dtype=torch.float64)
    phi = build_phi(C, 0.5, 2, len(patch_nums)).double()
    sums = []
    with torch.no_grad():
        idx, f_hat = multiscale_quantize(f, codebook, phi.__getitem__, patch_nums, cosine, on_scale=sums.append)
        assert [i.shape for i in idx] == [(B, pn * pn) for pn in patch_nums]
        assert torch.equal(sums[-1], f_hat)
        total = torch.zeros_like(f)
        for si, (pn, idx_Bl) in enumerate(zip(patch_nums, idx, strict=True)):
            rest = F.adaptive_avg_pool2d(f - total, pn).flatten(2).transpose(1, 2)  # (B, l, C)
            if cosine:
                distance = -(F.normalize(rest, dim=-1) @ F.normalize(codebook, dim=-1).T)
            else:
                distance = torch.cdist(rest, codebook, compute_mode="donot_use_mm_for_euclid_dist")
            chosen = distance.gather(-1, idx_Bl[..., None]).squeeze(-1)
            torch.testing.assert_close(chosen, distance.min(-1).values, atol=1e-9, rtol=1e-9)
            h = codebook[idx_Bl].transpose(1, 2).reshape(B, C, pn, pn)
            if pn != side:
                h = F.interpolate(h, size=(side, side), mode="bicubic", align_corners=False)
            total = total + phi[si / max(len(patch_nums) - 1, 1)](h)
            torch.testing.assert_close(sums[si], total)


def test_gradient_reaches_codes_and_phi_but_not_the_input():
    f = torch.randn(1, 8, 3, 3, requires_grad=True)
    codebook = torch.randn(5, 8, requires_grad=True)
    phi = build_phi(8, 0.5, 1, 2)
    _, f_hat = multiscale_quantize(f, codebook, phi.__getitem__, (1, 3))
    f_hat.square().sum().backward()
    assert codebook.grad.abs().sum() > 0 and phi.qresi.weight.grad.abs().sum() > 0 and f.grad is None


def test_last_scale_must_be_the_map():
    with pytest.raises(ValueError, match="f_BChw"):
        multiscale_quantize(torch.zeros(1, 2, 4, 4), torch.zeros(3, 2), lambda _: lambda h: h, (1, 2, 3))
