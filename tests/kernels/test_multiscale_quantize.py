"""The Triton kernels of multiscale_quantize: each scale against float64, given the tokens of the scales before it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from var_fast.layout import PUBLISHED_PATCH_NUMS
from var_fast.models.phi import build_phi
from var_fast.ops import multiscale_quantize, multiscale_quantize_reference
from var_fast.ops.backend import BackendUnavailable
from var_fast.ops.multiscale_quantize import area_down, bicubic_up, scale_position

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
run = partial(multiscale_quantize, backend="triton")


def make(B, C, V, patch_nums, layers=4, ratio=0.5, seed=0):
    """f, codebook and phi without gradients."""
    g = torch.Generator().manual_seed(seed)
    last = patch_nums[-1]
    f_BChw = torch.randn(B, C, *((last, last) if isinstance(last, int) else last), generator=g)
    codebook_VC = torch.randn(V, C, generator=g) * torch.rand(V, 1, generator=g)
    phi = build_phi(C, ratio, layers, len(patch_nums)).requires_grad_(False)
    for parameter in phi.parameters():
        parameter.uniform_(-((9 * C) ** -0.5), (9 * C) ** -0.5, generator=g)
    return f_BChw.to(DEVICE), codebook_VC.to(DEVICE), phi.to(DEVICE)


def check(f_BChw, codebook_VC, phi, patch_nums, cosine=False):
    """A tie may be broken either way and then the later scales differ, so every scale is held to the float64 search of
    what the result's own earlier tokens leave: as near to the rounding of float32. Sums: relative error 2e-6."""
    sums = []
    idx, f_hat = run(f_BChw, codebook_VC, phi.__getitem__, patch_nums, cosine, on_scale=sums.append)
    assert sums[-1].data_ptr() == f_hat.data_ptr() and len(sums) == len(idx) == len(patch_nums)
    B, C, h, w = f_BChw.shape
    f, codebook = f_BChw.double(), codebook_VC.double()
    total = torch.zeros_like(f)
    for si, (pn, idx_Bl, sum_BChw) in enumerate(zip(patch_nums, idx, sums, strict=True)):
        ph, pw = (pn, pn) if isinstance(pn, int) else pn
        assert idx_Bl.shape == (B, ph * pw) and idx_Bl.dtype == torch.int64 and idx_Bl.is_contiguous()
        assert sum_BChw.shape == f.shape and sum_BChw.dtype == f_BChw.dtype
        z = area_down(f - total, (ph, pw)).permute(0, 2, 3, 1).reshape(-1, C)
        if cosine:
            distance = 1 - F.normalize(z, dim=-1) @ F.normalize(codebook, dim=-1).T
            size = f.abs().max() / z.norm(dim=1).clamp(min=1e-3)  # the rest is a difference of numbers of f's size
        else:
            distance = torch.cdist(z, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
            size = z.square().sum(1) + codebook.square().sum(1).max()
        chosen = distance.gather(1, idx_Bl.reshape(-1, 1)).squeeze(1)
        assert (chosen <= distance.min(1).values + 2e-6 * size).all(), f"scale {si}"
        h_BCpp = codebook[idx_Bl].transpose(1, 2).reshape(B, C, ph, pw)
        h_BChw = bicubic_up(h_BCpp, (h, w))
        layer = phi[scale_position(si, len(patch_nums))]
        if not isinstance(layer, nn.Identity):
            convolved = F.conv2d(h_BChw, layer.weight.double(), layer.bias.double(), padding=1)
            h_BChw = (1 - layer.resi_ratio) * h_BChw + layer.resi_ratio * convolved
        total = total + h_BChw
        error = ((sum_BChw - total).norm() / total.norm()).item()
        assert error <= 2e-6, f"scale {si}: {error:.1e}"


pyramids = st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True).map(sorted)


@settings(deadline=None, max_examples=8)
@given(
    pyramids,
    st.integers(1, 2),
    st.sampled_from([4, 16, 20]),
    st.integers(1, 300),
    st.sampled_from([0, 1, 2, 4]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_any_pyramid(patch_nums, B, C, V, layers, cosine, seed):
    check(*make(B, C, V, patch_nums, layers, 0.5, seed), patch_nums, cosine)


@pytest.mark.parametrize("patch_nums", [((1, 2), (3, 4), (5, 7)), ((2, 1), (3, 1)), ((6, 2), (4, 5))])
def test_maps_that_are_not_square(patch_nums):
    check(*make(2, 8, 60, patch_nums), patch_nums)


def test_large_tiles(monkeypatch):
    from var_fast.kernels import codebook_search, multiscale_quantize

    monkeypatch.setattr(codebook_search, "FEW", 20)
    monkeypatch.setattr(multiscale_quantize, "LARGE", 1)
    check(*make(2, 16, 50, (2, 5, 9)), (2, 5, 9))


def test_areas_wider_than_what_is_loaded_at_once():
    check(*make(1, 4, 30, (1, (2, 18)), layers=1), (1, (2, 18)))


def test_no_phi_at_all():
    f, codebook, phi = make(2, 8, 40, (1, 3, 6), ratio=0.0)
    assert not list(phi.parameters())
    check(f, codebook, phi, (1, 3, 6))


def test_some_scales_without_phi():
    f, codebook, phi = make(1, 8, 40, (1, 3, 5), layers=0)
    torch.nn.ModuleList.__setitem__(phi, 1, nn.Identity())
    check(f, codebook, phi, (1, 3, 5))


def test_input_that_is_not_contiguous():
    f, codebook, phi = make(2, 8, 40, (1, 3))
    wide = torch.randn(2, 8, 6, 3).to(f)
    check(wide[:, :, ::2].transpose(2, 3), codebook, phi, (1, 3))
    check(f.to(memory_format=torch.channels_last), codebook, phi, (1, 3))


def test_half_precision_is_computed_in_float32():
    f, codebook, phi = make(1, 8, 40, (1, 2, 4))
    f, codebook, phi = f.half(), codebook.half(), phi.half()
    idx, f_hat = run(f, codebook, phi.__getitem__, (1, 2, 4))
    expected_idx, expected = run(f.float(), codebook.float(), phi.float().__getitem__, (1, 2, 4))
    assert f_hat.dtype == torch.float16 and torch.equal(f_hat, expected.half())
    assert all(torch.equal(a, b) for a, b in zip(idx, expected_idx))


def loops(monkeypatch) -> list:
    """Fills with the arguments of every call of the reference, the loop over scales."""
    import sys

    module, calls = sys.modules["var_fast.ops.multiscale_quantize"], []

    def reference(*arguments):
        calls.append(arguments)
        return multiscale_quantize_reference(*arguments)

    monkeypatch.setattr(module, "multiscale_quantize_reference", reference)
    return calls


def test_gradients_take_the_loop_with_a_fast_search(monkeypatch):
    calls = loops(monkeypatch)
    f, codebook, phi = make(1, 8, 20, (1, 3))
    run(f.requires_grad_(), codebook, phi.__getitem__, (1, 3))
    assert not calls
    codebook.requires_grad_()
    idx, f_hat = run(f, codebook, phi.__getitem__, (1, 3))
    f_hat.square().sum().backward()
    assert len(calls) == 1 and calls[0][-1].keywords == {"backend": "triton"}
    expected = codebook.detach().clone().requires_grad_()
    expected_idx, f_hat = multiscale_quantize_reference(f, expected, phi.__getitem__, (1, 3))
    f_hat.square().sum().backward()
    torch.testing.assert_close(codebook.grad, expected.grad)
    assert all(torch.equal(a, b) for a, b in zip(idx, expected_idx)) and f.grad is None
    with torch.no_grad():
        run(f, codebook, phi.__getitem__, (1, 3))
    assert len(calls) == 1


def test_other_layers_and_residuals_take_the_loop(monkeypatch):
    calls, searched = loops(monkeypatch), []
    f, codebook, phi = make(1, 8, 20, (1, 3))
    run(f, codebook, phi.__getitem__, (1, 3), on_residual=searched.append)
    assert len(calls) == 1 and [z.shape for z in searched] == [(1, 8), (9, 8)]
    layer = nn.Conv2d(8, 8, 3, padding=1, device=DEVICE).requires_grad_(False)
    _, f_hat = run(f, codebook, lambda position: layer, (1, 3))
    assert len(calls) == 2 and torch.isfinite(f_hat).all()


def test_a_batch_of_none():
    f, codebook, phi = make(0, 8, 20, (1, 3))
    idx, f_hat = run(f, codebook, phi.__getitem__, (1, 3))
    assert [i.shape for i in idx] == [(0, 1), (0, 9)] and f_hat.shape == f.shape


def test_every_element_is_written_the_same_way_in_every_run(monkeypatch):
    poisoned, new_empty = [], torch.Tensor.new_empty

    def poison(self, *size, **options):
        made = new_empty(self, *size, **options)
        poisoned.append(made.fill_(torch.nan if made.dtype.is_floating_point else -1))
        return made

    f, codebook, phi = make(2, 8, 20, (1, 3, 4))
    sums = []
    idx, _ = run(f, codebook, phi.__getitem__, (1, 3, 4), on_scale=sums.append)
    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    poisoned_idx, poisoned_f_hat = run(f, codebook, phi.__getitem__, (1, 3, 4))
    assert len(poisoned) >= 5
    assert torch.equal(sums[-1], poisoned_f_hat) and all(torch.equal(a, b) for a, b in zip(idx, poisoned_idx))


def test_float64_is_refused():
    f, codebook, phi = make(1, 8, 20, (1, 3))
    with pytest.raises(BackendUnavailable, match="multiscale_quantize: .* float64"):
        run(f.double(), codebook, phi.__getitem__, (1, 3))


@pytest.mark.parametrize("every_sum", [False, True])
def test_opcheck(every_sum):
    f, codebook, phi = make(1, 4, 9, (1, 2), layers=1)
    layer = phi[0.0]
    arguments = (f, codebook, [layer.weight], [layer.bias], [0.5], [0, -1], [1, 1, 2, 2], False, every_sum)
    torch.library.opcheck(torch.ops.var_fast.multiscale_quantize_triton.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("B, image_size", [(1, 256), (3, 256), (64, 256), (1, 512), (8, 512), (1, 1024)])
def test_on_a_gpu(B, image_size, cosine):
    patch_nums = PUBLISHED_PATCH_NUMS[image_size]
    f, codebook, phi = make(B, 32, 4096, patch_nums)
    check(f, codebook, phi, patch_nums, cosine)
    runs = [run(f, codebook, phi.__getitem__, patch_nums, cosine) for _ in range(2)]
    assert torch.equal(runs[0][1], runs[1][1]) and all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0]))
