"""The Triton kernels of adaln_modulate and residual_adaln_modulate against the references in float64."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.errors import UserError
from var_fast.ops import (
    adaln_modulate,
    adaln_modulate_reference,
    residual_adaln_modulate,
    residual_adaln_modulate_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: (1e-5, 2e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1e-2, 1e-2)}


def make(B, L, C, dtype, seed=0, device=DEVICE):
    """x, branch, gate, scale, shift; and upstream gradients of x' and y."""
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(B, L, C, generator=g) for _ in range(4)]
    per_image = [torch.randn(B, C, generator=g) for _ in range(3)]
    x, branch, dsum, dy = (t.to(device, dtype) for t in maps)
    gate, scale, shift = (t.to(device, dtype) for t in per_image)
    return [t.requires_grad_() for t in (x, branch, gate, scale, shift)], (dsum, dy)


def compare(run, reference, inputs, upstream, dtype):
    """Results and gradients of `run` on `inputs`, held to `reference` in float64."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found, right = run(*inputs), reference(*exact)
    found, right = ((t,) if isinstance(t, torch.Tensor) else t for t in (found, right))
    upstream = upstream[-len(found) :]
    gradients = torch.autograd.grad(found, inputs, upstream)
    right_gradients = torch.autograd.grad(right, exact, [g.double() for g in upstream])
    forward, backward = TOLERANCE[dtype]
    for results, exacts, tolerance in ((found, right, forward), (gradients, right_gradients, backward)):
        for i, (a, b) in enumerate(zip(results, exacts, strict=True)):
            assert a.dtype == dtype and a.shape == b.shape
            error = ((a.double() - b).norm() / b.norm()).item()
            assert error <= tolerance, f"result {i}: {error:.1e}"


def run_plain(x, scale, shift):
    return adaln_modulate(x, scale, shift, backend="triton")


def run_residual(*inputs):
    return residual_adaln_modulate(*inputs, backend="triton")


def check(B, L, C, dtype, seed=0):
    inputs, upstream = make(B, L, C, dtype, seed)
    compare(run_residual, residual_adaln_modulate_reference, inputs, upstream, dtype)
    compare(run_plain, adaln_modulate_reference, [inputs[0], *inputs[3:]], upstream, dtype)


# C = 1 would have no deviation, and a norm of rounding errors
@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.sampled_from([8, 16, 40, 72, 264]),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 2**16),
)
def test_any_shape(B, L, C, dtype, seed):
    check(B, L, C, dtype, seed)


@pytest.mark.parametrize("C", [1024, 1920, 4608])
def test_widths_of_the_models(C):
    check(1, 3, C, torch.float32)


def test_many_rows_in_several_shares(monkeypatch):
    from var_fast.kernels import adaln_modulate as kernel

    monkeypatch.setattr(kernel, "SHARES", 6)  # 2 images of 3 shares of 128 rows, the last of them partly empty
    check(2, 300, 64, torch.float32)


def test_offset_data_keeps_its_digits():
    # a variance from E[x^2] - E[x]^2 in float32 would be off by 5e-5
    inputs, upstream = make(1, 4, 256, torch.float32)
    inputs[0] = (inputs[0].detach() + 30).requires_grad_()
    compare(run_plain, adaln_modulate_reference, [inputs[0], *inputs[3:]], upstream, torch.float32)


def test_inputs_and_gradients_that_are_not_contiguous():
    wide, _ = make(2, 5, 64, torch.float32)
    x, branch = wide[0].detach()[..., 1::2].requires_grad_(), wide[1].detach().transpose(0, 1)[:2].repeat(1, 3, 1)
    x, branch = x[:, :5], branch[:, :5, :32].transpose(1, 2).contiguous().transpose(1, 2)
    six = torch.randn(2, 6, 32, device=DEVICE).unbind(1)  # as they lie in the projection of the condition
    inputs = [t.detach().requires_grad_() for t in (x, branch, *six[:3])]
    assert not inputs[0].is_contiguous() and not inputs[1].is_contiguous() and not inputs[2].is_contiguous()
    upstream = [torch.randn(2, 32, 5, device=DEVICE).transpose(1, 2) for _ in range(2)]
    compare(run_residual, residual_adaln_modulate_reference, inputs, upstream, torch.float32)


def test_a_broadcast_modulation():
    inputs, upstream = make(3, 4, 16, torch.float32)
    one = [t.detach()[:1].requires_grad_() for t in inputs[2:]]

    def expanded(run):
        return lambda x, branch, *per_image: run(x, branch, *(m.expand(3, -1) for m in per_image))

    inputs = [*inputs[:2], *one]
    compare(expanded(run_residual), expanded(residual_adaln_modulate_reference), inputs, upstream, torch.float32)


def test_the_same_bits_in_every_run():
    inputs, upstream = make(2, 37, 72, torch.float32)
    runs = []
    for _ in range(2):
        outputs = run_residual(*inputs)
        runs.append([*outputs, *torch.autograd.grad(outputs, inputs, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_every_element_is_written(monkeypatch):
    poisoned = []

    def poison(like, **options):
        poisoned.append(torch.full_like(like, torch.nan, **options))
        return poisoned[-1]

    monkeypatch.setattr(torch, "empty_like", poison)
    inputs, upstream = make(2, 5, 40, torch.float32)
    outputs = run_residual(*inputs)
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    assert len(poisoned) >= 4
    assert all(t.isfinite().all() for t in (*outputs, *gradients))


def test_types_may_differ():
    inputs, upstream = make(2, 3, 16, torch.float16)
    inputs = [*inputs[:2], *(t.detach().float().requires_grad_() for t in inputs[2:])]
    x, y = run_residual(*inputs)
    assert x.dtype == y.dtype == torch.float16
    gradients = torch.autograd.grad((x, y), inputs, upstream)
    assert [g.dtype for g in gradients] == [torch.float16] * 2 + [torch.float32] * 3


def test_opcheck():
    inputs, _ = make(2, 3, 8, torch.float32)
    x, branch, gate, scale, shift = inputs
    torch.library.opcheck(torch.ops.var_fast.adaln_modulate_triton.default, (x, scale, shift, 1e-6))
    torch.library.opcheck(torch.ops.var_fast.residual_adaln_modulate_triton.default, (*inputs, 1e-6))
    dy = torch.randn_like(x)
    arguments = [t.detach() for t in (dy, x, scale)]
    torch.library.opcheck(torch.ops.var_fast.adaln_modulate_backward_triton.default, (*arguments, 1e-6))
    arguments = [t.detach() for t in (dy, dy, x, branch, gate, scale)]
    torch.library.opcheck(torch.ops.var_fast.residual_adaln_modulate_backward_triton.default, (*arguments, 1e-6))


def test_asked_for_without_the_interpreter_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, per_image = torch.zeros(1, 2, 8), torch.zeros(1, 8)
    with pytest.raises(UserError, match="adaln_modulate: backend 'triton' .* implemented for cuda only"):
        adaln_modulate(x, per_image, per_image, backend="triton")


def test_auto_never_interprets():
    from var_fast.ops.backend import choose_backend, native_problem

    assert os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
    assert choose_backend("adaln_modulate", "cpu") == ("native" if native_problem() is None else "reference")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("B, L, C", [(2, 680, 1024), (1, 2240, 2304), (3, 77, 1920), (1, 9, 4608), (64, 680, 64)])
def test_on_a_gpu(B, L, C, dtype):
    check(B, L, C, dtype)
