"""pyramid_update against the quantizer's own step, which the golden values hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast import VectorQuantizer2
from var_fast.ops import pyramid_update


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=4, unique=True).map(sorted), st.data())
def test_equals_the_quantizers_step(patch_nums, data):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    torch.manual_seed(0)
    quantize = VectorQuantizer2(9, 4, False, v_patch_nums=patch_nums, share_quant_resi=1).requires_grad_(False)
    si = data.draw(st.integers(0, len(patch_nums) - 2))
    pn, pn_next, side = patch_nums[si], patch_nums[si + 1], patch_nums[-1]
    idx_Bl = torch.randint(9, (2, pn * pn), generator=g)
    f_hat = torch.randn(2, 4, side, side, generator=g)
    phi = quantize.quant_resi.qresi
    ours = f_hat.clone()
    next_map = pyramid_update(
        idx_Bl, quantize.embedding.weight, phi.weight, phi.bias, phi.resi_ratio, ours, pn, pn_next
    )
    h = quantize.embedding(idx_Bl).transpose(1, 2).reshape(2, 4, pn, pn)
    f_ref, next_ref = quantize.get_next_autoregressive_input(si, len(patch_nums), f_hat, h)
    torch.testing.assert_close(ours, f_ref)
    torch.testing.assert_close(next_map, next_ref)
    assert next_map.shape == (2, 4, pn_next, pn_next)


def test_without_phi_the_code_itself_is_added():
    f_hat = torch.ones(1, 2, 2, 2)
    codebook = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    next_map = pyramid_update(torch.tensor([[1]]), codebook, None, None, 0.5, f_hat, 1, 2)
    assert torch.equal(f_hat, torch.tensor([4.0, 5.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2))
    assert torch.equal(next_map, f_hat) and next_map.data_ptr() != f_hat.data_ptr()


def test_wrong_token_count_is_named():
    with pytest.raises(ValueError, match="idx_Bl"):
        idx_Bl, f_hat = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, 4, 4)
        pyramid_update(idx_Bl, torch.zeros(2, 2), None, None, 0.5, f_hat, 2, 3)
