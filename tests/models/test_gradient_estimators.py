"""The gradient past the quantizer: straight through, and by the rotation trick against explicit rotation matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from var_fast import VectorQuantizer2
from var_fast.models.gradient_estimators import rotation_trick, straight_through


def rotation(e_C: torch.Tensor, q_C: torch.Tensor) -> torch.Tensor:
    """(C, C): turns unit vector e into q in their plane, and leaves what is orthogonal to it; from the angle."""
    cosine = e_C @ q_C
    across_C = q_C - cosine * e_C
    sine = across_C.norm()
    across_C = across_C / sine
    generator = torch.outer(across_C, e_C) - torch.outer(e_C, across_C)
    return torch.eye(len(e_C), dtype=e_C.dtype) + sine * generator + (1 - cosine) * generator @ generator


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_rotation_trick_is_an_explicit_rotation_and_scaling(seed, channels):
    draw = torch.Generator().manual_seed(seed)
    f, f_hat, grad = (torch.randn(2, channels, 2, 3, dtype=torch.float64, generator=draw) for _ in range(3))
    unit, unit_hat = (x / x.norm(dim=1, keepdim=True) for x in (f, f_hat))
    assume((unit + unit_hat).norm(dim=1).min() > 2e-3)  # else they count as opposite
    f.requires_grad_()
    out = rotation_trick(f, f_hat)
    assert torch.equal(out, f_hat)
    out.backward(grad)
    for b in range(2):
        for y in range(2):
            for x in range(3):
                e, q = f[b, :, y, x].detach(), f_hat[b, :, y, x]
                matrix = q.norm() / e.norm() * rotation(e / e.norm(), q / q.norm())
                torch.testing.assert_close(matrix @ e, q, rtol=1e-9, atol=1e-9)
                torch.testing.assert_close(f.grad[b, :, y, x], matrix.T @ grad[b, :, y, x], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_without_a_rotation_go_straight_through(dtype):
    f = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [3.0, -1.0]], dtype=dtype)
    f_hat = torch.tensor([[1.0, 0.5], [0.0, 0.0], [-2.0, -4.0], [3.0, -1.0]], dtype=dtype)
    f, f_hat = (x.T.reshape(1, 2, 2, 2).contiguous() for x in (f, f_hat))
    f.requires_grad_()
    grad = torch.randn(1, 2, 2, 2, dtype=dtype)
    out = rotation_trick(f, f_hat)
    out.backward(grad)
    assert torch.equal(out, f_hat)
    assert torch.equal(f.grad.flatten(2)[..., :3], grad.flatten(2)[..., :3])
    # Equal vectors: the rotation by nothing.
    torch.testing.assert_close(f.grad.flatten(2)[..., 3], grad.flatten(2)[..., 3], rtol=1e-6, atol=1e-6)


def test_straight_through_is_the_published_formula():
    f, f_hat = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    out = straight_through(f, f_hat)
    assert torch.equal(out, (f_hat - f.detach()) + f.detach())
    grad = torch.randn(2, 3, 4, 4)
    out.backward(grad)
    assert torch.equal(f.grad, grad)


def test_the_quantizer_passes_the_gradient_as_it_is_told():
    torch.manual_seed(0)
    quantizer = VectorQuantizer2(vocab_size=13, Cvae=8, using_znorm=False, beta=0.0, v_patch_nums=(1, 2, 4))
    assert quantizer.pass_gradient is straight_through
    quantizer.pass_gradient = rotation_trick
    f, grad = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8, 4, 4)
    f_hat, _, _ = quantizer(f)
    f_hat.backward(grad)
    again = f.detach().clone().requires_grad_()
    rotation_trick(again, f_hat.detach()).backward(grad)
    assert torch.equal(f.grad, again.grad)
    assert torch.equal(f_hat, quantizer.f_to_idxBl_or_fhat(f, to_fhat=True)[-1])


def test_hits_of_the_last_step_are_kept_but_not_saved():
    torch.manual_seed(0)
    quantizer = VectorQuantizer2(vocab_size=13, Cvae=8, using_znorm=False, v_patch_nums=(1, 2, 4))
    f = torch.randn(3, 8, 4, 4)
    assert quantizer.eval()(f) and quantizer.hit_SV is None
    quantizer.train()(f)
    expected = torch.stack([i.flatten().bincount(minlength=13) for i in quantizer.f_to_idxBl_or_fhat(f, to_fhat=False)])
    assert torch.equal(quantizer.hit_SV, expected.float())
    assert "hit_SV" not in quantizer.state_dict()
