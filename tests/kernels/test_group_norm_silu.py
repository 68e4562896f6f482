"""group_norm_silu in Triton against the reference in float64, and as an operator: formats, autograd, determinism."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.ops import group_norm_silu, group_norm_silu_reference
from var_fast.ops.group_norm_silu import _backward_triton, _triton

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCE = TOLERANCE | {torch.float32: 2e-5}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
NAMES = ("y", "dx", "dweight", "dbias")


def draw(B, C, h, w, dtype, seed=0, channels_last=True, mean=0.3):
    """x, weight, bias, dy."""
    g = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g, device=DEVICE)

    format = torch.channels_last if channels_last else torch.contiguous_format
    x_BChw, dy_BChw = (
        t.to(dtype).contiguous(memory_format=format) for t in (mean + 2 * normal(B, C, h, w), normal(B, C, h, w))
    )
    return x_BChw, 1 + 0.5 * normal(C), 0.5 * normal(C), dy_BChw


def run(x_BChw, weight_C, bias_C, dy_BChw, groups, backend):
    inputs = [t.detach().requires_grad_() for t in (x_BChw, weight_C, bias_C)]
    y_BChw = group_norm_silu(*inputs, groups, backend=backend)
    return y_BChw.detach(), *torch.autograd.grad(y_BChw, inputs, dy_BChw)


def distance(found, expected):
    error = torch.linalg.vector_norm(found.double() - expected)
    return (error / torch.linalg.vector_norm(expected).clamp_min(1e-30)).item()


def check(inputs, groups):
    """The Triton path against the reference, of the same inputs in float64."""
    x_BChw = inputs[0]
    expected = run(*(t.double() for t in inputs), groups, "reference")
    found = run(*inputs, groups, "triton")
    for name, f, e in zip(NAMES, found, expected, strict=True):
        assert f.dtype == (x_BChw.dtype if f.dim() == 4 else torch.float32), name
        assert f.shape == e.shape, name
        error = distance(f, e)
        assert error <= (TOLERANCE if name == "y" else GRADIENT_TOLERANCE)[x_BChw.dtype], (name, error)
    assert found[0].stride() == found[1].stride() == x_BChw.stride()


@pytest.fixture(params=["one run", "several runs"])
def runs(request, monkeypatch):
    """Several runs of pixels and several tiles in each, with few pixels: smaller tiles."""
    from var_fast.kernels import group_norm_silu as kernel

    if request.param == "several runs":
        monkeypatch.setattr(kernel, "SUM_TILE", 256)
        monkeypatch.setattr(kernel, "TILE", 512)
        options = kernel.launch_options(256, C=32, P=81, channels_last=True)
        assert options["BLOCK_P"] == 8 and kernel.run_length(81, options) == 32
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_matches_the_reference(dtype, runs):
    @settings(deadline=None, max_examples=6, derandomize=True)
    @given(
        st.integers(1, 3),
        st.sampled_from([(1, 3), (2, 8), (2, 10), (2, 64), (4, 96)]),
        st.integers(1, 11),
        st.integers(2, 9),
        st.booleans(),
        st.integers(0, 2**16),
    )
    def compare(B, groups_and_C, h, w, channels_last, seed):
        groups, C = groups_and_C
        check(draw(B, C, h, w, dtype, seed, channels_last), groups)

    compare()


@pytest.mark.parametrize("channels_last", [True, False])
def test_far_from_zero(channels_last, runs):
    """Mean 1000, deviation 2. Squares summed about zero would leave the variance wrong by some percent; half a unit
    in the last place of 1000 is 1.5e-5 deviations."""
    x_BChw, weight_C, bias_C, _ = draw(1, 32, 9, 9, torch.float32, channels_last=channels_last, mean=1000.0)
    x_BChw[:, :, 5:] += 50  # the first tile is no guide to the rest
    y_BChw = group_norm_silu(x_BChw, weight_C, bias_C, 4, backend="triton")
    expected = group_norm_silu_reference(x_BChw.double(), weight_C.double(), bias_C.double(), 4)
    assert distance(y_BChw, expected) < 2e-5


def test_constant_groups():
    """No variance: eps alone keeps the division finite."""
    x_BChw, weight_C, bias_C, dy_BChw = draw(1, 32, 4, 5, torch.float32)
    check((torch.full_like(x_BChw, 0.5), weight_C, bias_C, dy_BChw), 4)


def test_one_pixel():
    check(draw(3, 8, 1, 1, torch.float32), 2)


def test_strided_inputs():
    x_BChw, weight_C, bias_C, dy_BChw = draw(2, 32, 5, 7, torch.float32)
    expected = run(x_BChw, weight_C, bias_C, dy_BChw, 2, "triton")
    gaps = torch.cat((x_BChw, x_BChw), 1).to(memory_format=torch.channels_last)[:, :32]
    turned = x_BChw.transpose(2, 3).contiguous().transpose(2, 3)
    other_gradient = dy_BChw.contiguous()
    wide = [torch.stack((t, t), 1)[:, 0] for t in (weight_C, bias_C)]
    assert not any(t.is_contiguous() for t in (gaps, turned, *wide))
    for name, f, e in zip(NAMES, run(gaps, *wide, other_gradient, 2, "triton"), expected, strict=True):
        assert torch.equal(f, e), name
    for f, e in zip(run(turned, *wide, dy_BChw, 2, "triton"), expected, strict=True):
        torch.testing.assert_close(f, e)
    y_BChw = group_norm_silu(gaps, weight_C, bias_C, 2, backend="triton")
    assert y_BChw.is_contiguous(memory_format=torch.channels_last)


def test_expanded_gradient():
    x_BChw, weight_C, bias_C, _ = draw(1, 32, 3, 3, torch.float32)
    check((x_BChw, weight_C, bias_C, torch.ones((), device=DEVICE).expand(1, 32, 3, 3)), 32)


@pytest.mark.parametrize("channels_last", [True, False])
def test_every_element_is_written(channels_last, runs, monkeypatch):
    """On memory full of NaN: of results, shares and statistics."""
    from var_fast.kernels import group_norm_silu as kernel

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *size, **kw: t.new_full(size, float("nan"), **kw))
    monkeypatch.setattr(kernel.torch, "empty_like", lambda t, **kw: torch.full_like(t, float("nan"), **kw))
    x_BChw, weight_C, bias_C, dy_BChw = draw(2, 40, 5, 9, torch.float32, channels_last=channels_last)
    y_BChw, mean_BC, rstd_BC = kernel.forward(x_BChw, weight_C, bias_C, 2, 1e-6)
    gradients = kernel.backward(dy_BChw, x_BChw, mean_BC, rstd_BC, weight_C, bias_C, 2)
    assert all(t.isfinite().all() for t in (y_BChw, mean_BC, rstd_BC, *gradients))


def test_same_bits_every_run_and_in_every_batch(runs):
    inputs = draw(3, 32, 7, 9, torch.float16)
    first, second = (run(*inputs, 2, "triton") for _ in range(2))
    for name, f, s in zip(NAMES, first, second, strict=True):
        assert torch.equal(f, s), name
    x_BChw, weight_C, bias_C, dy_BChw = inputs
    alone = run(x_BChw[1:2], weight_C, bias_C, dy_BChw[1:2], 2, "triton")
    assert torch.equal(alone[0], first[0][1:2]) and torch.equal(alone[1], first[1][1:2])


def test_input_is_left_alone_and_nothing_is_kept_without_gradients():
    x_BChw, weight_C, bias_C, _ = draw(1, 32, 3, 3, torch.float32)
    before = x_BChw.clone()
    y_BChw = group_norm_silu(x_BChw, weight_C, bias_C, backend="triton")
    assert torch.equal(x_BChw, before)
    assert y_BChw.grad_fn is None


def test_under_autocast():
    """x's type comes out, computed in float32."""
    x_BChw, weight_C, bias_C, _ = draw(1, 32, 4, 4, torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        y_BChw = group_norm_silu(x_BChw, weight_C, bias_C, 4, backend="triton")
    expected = group_norm_silu_reference(x_BChw.double(), weight_C.double(), bias_C.double(), 4)
    assert y_BChw.dtype == torch.bfloat16
    assert distance(y_BChw, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("channels_last", [True, False])
def test_operators_are_well_formed(channels_last):
    x_BChw, weight_C, bias_C, dy_BChw = draw(2, 4, 3, 2, torch.float32, channels_last=channels_last)
    arguments = [t.requires_grad_() for t in (x_BChw, weight_C, bias_C)]
    torch.library.opcheck(_triton, (*arguments, 1, 1e-6))
    x_BChw, weight_C, bias_C = (t.detach() for t in arguments)
    _, mean_BC, rstd_BC = _triton(x_BChw, weight_C, bias_C, 1, 1e-6)
    torch.library.opcheck(_backward_triton, (dy_BChw, x_BChw, mean_BC, rstd_BC, weight_C, bias_C, 1))


def test_no_image():
    x_BChw, weight_C, bias_C, dy_BChw = draw(0, 32, 3, 4, torch.float32, channels_last=False)
    y_BChw, dx_BChw, dweight_C, dbias_C = run(x_BChw, weight_C, bias_C, dy_BChw, 8, "triton")
    assert y_BChw.shape == dx_BChw.shape == x_BChw.shape
    assert not dweight_C.any() and not dbias_C.any()


def test_compiles_without_a_graph_break():
    inputs = draw(1, 32, 3, 4, torch.float32)
    expected = run(*inputs, 2, "triton")
    x_BChw, weight_C, bias_C = (t.detach().requires_grad_() for t in inputs[:3])
    compiled = torch.compile(
        lambda x, w, b: group_norm_silu(x * 1, w, b, 2, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    y_BChw = compiled(x_BChw, weight_C, bias_C)
    found = y_BChw, *torch.autograd.grad(y_BChw, (x_BChw, weight_C, bias_C), inputs[3])
    for name, f, e in zip(NAMES, found, expected, strict=True):
        assert torch.equal(f, e), name


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("BChw", [(2, 160, 256, 256), (3, 320, 33, 31), (8, 640, 16, 16), (2, 128, 1, 1)], ids=str)
def test_on_a_gpu(BChw, dtype, channels_last):
    inputs = draw(*BChw, dtype, channels_last=channels_last)
    check(inputs, 32)
    for name, first, second in zip(NAMES, run(*inputs, 32, "triton"), run(*inputs, 32, "triton"), strict=True):
        assert torch.equal(first, second), name
