"""qk_norm in Triton against the reference in float64, and as an operator: views, autograd, compile, determinism."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.ops import qk_norm, qk_norm_reference
from var_fast.ops.qk_norm import _BACKWARD, _FORWARD

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCE = TOLERANCE | {torch.float32: 2e-5}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
NAMES = ("q", "k", "v", "dqkv", "dscale")


def draw(B, L, H, D, dtype, seed=0, spread=1.0):
    """qkv, scale and the gradients of q, k and v."""
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g, device=DEVICE)

    qkv_BL3HD = (normal(B, L, 3, H, D) * spread).to(dtype)
    scale_H = 1 + 10 * torch.rand(H, generator=g, device=DEVICE)
    return qkv_BL3HD, scale_H, tuple(normal(B, L, H, D).to(dtype) for _ in range(3))


def run(qkv_BL3HD, scale_H, gradients, backend):
    qkv_BL3HD, scale_H = (t.detach().clone().requires_grad_() for t in (qkv_BL3HD, scale_H))
    outputs = qk_norm(qkv_BL3HD, scale_H, backend=backend)
    torch.autograd.backward(outputs, gradients)
    return *(t.detach() for t in outputs), qkv_BL3HD.grad, scale_H.grad


def check(qkv_BL3HD, scale_H, gradients):
    """The Triton path against the reference, of the same inputs in float64."""
    expected = run(qkv_BL3HD.double(), scale_H.double(), [g.double() for g in gradients], "reference")
    found = run(qkv_BL3HD, scale_H, gradients, "triton")
    for name, f, e in zip(NAMES, found, expected, strict=True):
        tolerance = (GRADIENT_TOLERANCE if name.startswith("d") else TOLERANCE)[qkv_BL3HD.dtype]
        assert f.dtype == (torch.float32 if name == "dscale" else qkv_BL3HD.dtype), name
        assert f.shape == e.shape, name
        error = torch.linalg.vector_norm(f.double() - e) / torch.linalg.vector_norm(e).clamp_min(1e-30)
        assert error <= tolerance, (name, error.item())


@pytest.fixture(params=["one round", "several rounds"])
def rounds(request, monkeypatch):
    """Several rounds of a backward program with few rows: fewer programs, smaller tiles."""
    from var_fast.kernels import qk_norm as kernel

    if request.param == "several rounds":
        monkeypatch.setattr(kernel, "PROGRAMS", 2)
        monkeypatch.setattr(kernel, "BACKWARD_TILE", 64)
        assert kernel._share(tiles=21, H=3) == (3, 11)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_matches_the_reference(dtype, rounds):
    @settings(deadline=None, max_examples=8, derandomize=True)
    @given(
        st.integers(1, 3),
        st.integers(1, 14),
        st.integers(1, 7),
        st.sampled_from([8, 16, 24, 40, 64, 96, 128]),
        st.integers(0, 2**16),
    )
    def compare(B, L, H, D, seed):
        check(*draw(B, L, H, D, dtype, seed))

    compare()


@pytest.mark.parametrize("spread", [0.0, 1e-14, 1e-9, 1e9])
def test_extreme_lengths(spread):
    """Vectors of length 0 and below the floor of 1e-12 too, where the gradient is that of a division by the floor."""
    check(*draw(1, 5, 2, 16, torch.float32, spread=spread))


def test_strided_inputs():
    qkv_BL3HD, scale_H, gradients = draw(2, 5, 4, 16, torch.float32)
    expected = run(qkv_BL3HD, scale_H, gradients, "triton")
    strided = qkv_BL3HD.transpose(0, 1).contiguous().transpose(0, 1)
    wide_scale = scale_H[:, None].expand(-1, 2).contiguous()[:, 0]
    transposed = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in gradients]
    assert not any(t.is_contiguous() for t in (strided, wide_scale, *transposed))
    x, s = strided.detach().requires_grad_(), wide_scale.detach().requires_grad_()
    outputs = qk_norm(x, s, backend="triton")
    torch.autograd.backward(outputs, transposed)
    for name, f, e in zip(NAMES, (*outputs, x.grad, s.grad), expected, strict=True):
        assert torch.equal(f, e), name


def test_expanded_gradients():
    qkv_BL3HD, scale_H, _ = draw(1, 3, 2, 8, torch.float32)
    check(qkv_BL3HD, scale_H, [torch.ones((), device=DEVICE).expand(1, 3, 2, 8)] * 3)


def test_only_v_used():
    qkv_BL3HD, scale_H, (_, _, dv) = draw(1, 3, 2, 8, torch.float32)
    qkv_BL3HD.requires_grad_()
    qk_norm(qkv_BL3HD, scale_H, backend="triton")[2].backward(dv)
    assert torch.equal(qkv_BL3HD.grad[:, :, 2], dv)
    assert not qkv_BL3HD.grad[:, :, :2].any()


@pytest.mark.parametrize("scale", [True, False])
def test_v_is_a_view(scale):
    qkv_BL3HD, scale_H, _ = draw(1, 3, 2, 8, torch.float32)
    v_BLHD = qk_norm(qkv_BL3HD, scale_H if scale else None, backend="triton")[2]
    assert v_BLHD.data_ptr() == qkv_BL3HD[:, :, 2].data_ptr()


def test_every_element_is_written(rounds, monkeypatch):
    """On memory full of NaN: of results and of partial sums."""
    from var_fast.kernels import qk_norm as kernel

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *size, **kw: t.new_full(size, float("nan"), **kw))
    monkeypatch.setattr(kernel.torch, "empty_like", lambda t, **kw: torch.full_like(t, float("nan"), **kw))
    qkv_BL3HD, scale_H, gradients = draw(2, 7, 3, 24, torch.float32)
    assert all(t.isfinite().all() for t in kernel.forward(qkv_BL3HD, scale_H))
    assert all(t.isfinite().all() for t in kernel.backward(*gradients, qkv_BL3HD, scale_H))


def test_same_bits_every_run(rounds):
    inputs = draw(2, 9, 3, 16, torch.float16)
    for name, first, second in zip(NAMES, run(*inputs, "triton"), run(*inputs, "triton"), strict=True):
        assert torch.equal(first, second), name


def test_a_token_does_not_depend_on_its_batch():
    qkv_BL3HD, scale_H, _ = draw(3, 5, 3, 16, torch.float32)
    whole, alone = (qk_norm(x, scale_H, backend="triton") for x in (qkv_BL3HD, qkv_BL3HD[1:2, 2:]))
    assert all(torch.equal(w[1:2, 2:], a) for w, a in zip(whole, alone, strict=True))


def test_under_autocast():
    """Computed in float32 and rounded once."""
    qkv_BL3HD, scale_H, _ = draw(1, 5, 2, 16, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        q, k, v = qk_norm(qkv_BL3HD, scale_H, backend="triton")
    expected = qk_norm_reference(qkv_BL3HD.float(), scale_H)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    for found, e in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(found.float(), e, rtol=2**-7, atol=0)  # the interpreter truncates


def test_operators_are_well_formed():
    qkv_BL3HD, scale_H, gradients = draw(2, 3, 2, 8, torch.float32)
    strided = qkv_BL3HD.transpose(0, 1).contiguous().transpose(0, 1)
    for qkv in (qkv_BL3HD, strided):
        torch.library.opcheck(_FORWARD["triton"], (qkv, scale_H))
        torch.library.opcheck(_BACKWARD["triton"], (*gradients, qkv, scale_H))
    assert [t.shape for t in _FORWARD["triton"](qkv_BL3HD[:0], scale_H)] == [(0, 3, 2, 8)] * 2
    empty = [g[:0] for g in gradients]
    assert not _BACKWARD["triton"](*empty, qkv_BL3HD[:0], scale_H)[1].any()


def test_compiles_without_a_graph_break():
    """And v stays a view, its gradient packed by the kernel."""
    inputs = draw(1, 4, 2, 8, torch.float32)
    expected = run(*inputs, "triton")
    qkv_BL3HD, scale_H = (t.detach().clone().requires_grad_() for t in inputs[:2])
    compiled = torch.compile(lambda x, s: qk_norm(x * 1, s, backend="triton"), fullgraph=True, backend="aot_eager")
    outputs = compiled(qkv_BL3HD, scale_H)
    torch.autograd.backward(outputs, inputs[2])
    for name, f, e in zip(NAMES, (*outputs, qkv_BL3HD.grad, scale_H.grad), expected, strict=True):
        assert torch.equal(f, e), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("BLHD", [(4, 680, 16, 64), (3, 679, 30, 64), (1, 1, 20, 96), (2, 333, 5, 40)], ids=str)
def test_on_a_gpu(BLHD, dtype):
    inputs = draw(*BLHD, dtype)
    check(*inputs)
    for name, first, second in zip(NAMES, run(*inputs, "triton"), run(*inputs, "triton"), strict=True):
        assert torch.equal(first, second), name
