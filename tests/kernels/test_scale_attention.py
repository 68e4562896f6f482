"""scale_attention in Triton against its reference in float64, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.errors import UserError
from var_fast.kernels import scale_attention as kernels
from var_fast.ops import scale_attention, scale_attention_reference
from var_fast.ops.backend import FAST_BACKENDS, BackendUnavailable

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter, on the CPU")
# forward, gradients
TOLERANCE = {torch.float32: (1e-5, 2e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (1e-2, 1e-2)}
SMALL = kernels.Options(rows=32, tile=32, masked=16, warps=4, stages=1)
"""Tiles that short sequences fill several of."""


def relative_error(out: torch.Tensor, expected: torch.Tensor, least_norm: float = 0.0) -> float:
    return ((out.double() - expected).norm() / expected.norm().clamp_min(least_norm)).item()


def packed(B, L, H, D, dtype, seed, device="cpu"):
    """q, k, v as they come out of one projection: views of it, not contiguous."""
    g = torch.Generator(device).manual_seed(seed)
    qkv_BL3HD = torch.randn(B, L, 3, H, D, generator=g, device=device, dtype=torch.float32).to(dtype)
    return [x.detach().requires_grad_() for x in qkv_BL3HD.unbind(2)]


def check(q, k, v, patch_nums, softmax_scale, do=None):
    """Result and every gradient against float64; returns them."""
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = scale_attention_reference(*exact, patch_nums, softmax_scale)
    out = scale_attention(q, k, v, patch_nums, softmax_scale, backend="triton")
    assert out.dtype == q.dtype and out.shape == q.shape and out.is_contiguous()
    if do is None:
        do = torch.randn(out.shape, generator=torch.Generator(q.device).manual_seed(1), device=q.device).to(q.dtype)
    expected_grads = torch.autograd.grad(expected, exact, do.double())
    grads = torch.autograd.grad(out, (q, k, v), do)
    forward, backward = TOLERANCE[q.dtype]
    assert relative_error(out, expected) < forward
    for name, grad, expected_grad in zip("qkv", grads, expected_grads):
        assert grad.dtype == q.dtype and grad.is_contiguous()
        # a query that sees one key only has no gradient
        error = relative_error(grad, expected_grad, 0.05 * do.double().norm().item())
        assert error < backward, f"gradient of {name}"
    return out, *grads


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "launch_options", lambda *_: SMALL)


# ------------------------------------------------------------------------------------------------------------- plans
pyramids = st.lists(st.integers(1, 12), min_size=1, max_size=6, unique=True).map(sorted)
tiles = st.sampled_from([16, 32, 64])


def scale_ends(patch_nums):
    return torch.tensor([pn * pn for pn in patch_nums]).cumsum(0).tolist()


@settings(deadline=None, max_examples=50)
@given(pyramids, tiles, tiles, tiles)
def test_plan_visits_every_open_pair_once(patch_nums, rows, tile, masked):
    ends = scale_ends(patch_nums)
    scale_of_token = torch.bucketize(torch.arange(ends[-1]), torch.tensor(ends), right=True)
    allowed = scale_of_token[:, None] >= scale_of_token[None]  # (query, key)
    visited = torch.zeros_like(allowed, dtype=torch.int)
    for begin, end, open_end, last in kernels.query_plan(ends, rows, tile, masked):
        assert end - begin <= rows and open_end % tile == 0 and allowed[begin:end, :open_end].all()
        assert not allowed[begin:end, last:].any() and allowed[end - 1, :last].all()
        visited[begin:end, :last] += 1
    assert (visited[allowed] == 1).all() and visited.max() == 1
    visited.zero_()
    for begin, end, first, open_begin in kernels.key_plan(ends, rows, tile, masked):
        assert end - begin <= rows and (ends[-1] - open_begin) % tile == 0 and allowed[open_begin:, begin:end].all()
        assert not allowed[:first, begin:end].any() and allowed[first:, begin].all()
        visited[first:, begin:end] += 1
    assert (visited[allowed] == 1).all() and visited.max() == 1


@pytest.mark.parametrize(
    "patch_nums", [(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)], ids=["256px", "512px"]
)
def test_plan_starts_with_the_longest_and_wastes_little(patch_nums):
    ends = scale_ends(patch_nums)
    plan = kernels.query_plan(ends, 128, 128, 64)
    assert sorted(plan, key=lambda entry: -entry[3]) == plan
    visited = 128 * sum(last for *_, last in plan)
    allowed = sum((end - begin) * end for begin, end in zip([0, *ends], ends))
    assert visited < 1.35 * allowed


# ------------------------------------------------------------------------------------------------------- interpreter
@interpreted
@settings(deadline=None, max_examples=10)
@given(
    patch_nums=st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True).map(sorted),
    data=st.data(),
    D=st.sampled_from([32, 64]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    # sharper scores than these, among few keys, leave q and k gradients that rounding o to float16 alone puts 1% off
    softmax_scale=st.sampled_from([0.05, 0.125]),
    seed=st.integers(0, 2**16),
)
def test_result_and_gradients(patch_nums, data, D, dtype, softmax_scale, seed):
    scales = data.draw(st.integers(1, len(patch_nums)))  # a prefix: progressive training
    L, (B, H) = sum(pn * pn for pn in patch_nums[:scales]), data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch_options", lambda *_: SMALL)
        check(*packed(B, L, H, D, dtype, seed), patch_nums, softmax_scale)


@interpreted
@pytest.mark.parametrize("D", [96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_wide_heads(D, dtype, small_tiles):
    check(*packed(1, 14, 2, D, dtype, 0), (1, 2, 3), D**-0.5)


@interpreted
def test_tiles_in_use():
    """No small tiles: those of architecture 80, for a sequence longer than one of them."""
    check(*packed(1, 174, 1, 64, torch.float16, 0), (1, 2, 5, 12), 0.125)


@interpreted
def test_gradient_and_inputs_of_any_strides(small_tiles):
    patch_nums, (B, L, H, D) = (1, 2, 5), (2, 30, 2, 32)
    g = torch.Generator().manual_seed(0)
    q, do = (torch.randn(B, H, L, D, generator=g).transpose(1, 2) for _ in range(2))  # heads outside
    k = torch.randn(L, B, H, 2 * D, generator=g).transpose(0, 1)[..., D:]  # images inside, part of the channels
    v = torch.randn(B, H, D, L, generator=g).permute(0, 3, 1, 2)  # channels apart: copied
    assert not any(x.is_contiguous() for x in (q, k, v, do))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    check(q, k, v, patch_nums, 0.2, do)
    check(q, k, v, patch_nums, 0.2, torch.ones(()).expand(B, L, H, D))


@interpreted
def test_large_scores(small_tiles):
    """Unit queries times 100, as a learned scale may make them: exp of the scores overflows without the maximum."""
    q, k, v = packed(1, 30, 1, 64, torch.float32, 0)
    q, k = (torch.nn.functional.normalize(x, dim=-1).detach().requires_grad_() for x in (q, k))
    q = (100 * q + 100 * k.mean(1, keepdim=True)).detach().requires_grad_()
    check(q, k, v, (1, 2, 5), 1.0)


@interpreted
def test_writes_every_element_and_reads_none_outside(small_tiles, monkeypatch):
    """Results lie in memory full of NaN, and so do the inputs."""

    def poisoned(x, dtype=None, **_):
        return torch.full(x.shape, torch.nan, dtype=dtype or x.dtype)

    around = torch.full((3, 1, 40, 2, 48), torch.nan)
    q, k, v = around[:, :, 5:35, :, 8:40].normal_(generator=torch.Generator().manual_seed(0))
    ends = [1, 5, 30]
    monkeypatch.setattr(torch, "empty_like", poisoned)
    o, lse = kernels.forward(q, k, v, ends, 0.2)
    grads = kernels.backward(v, q, k, v, o, lse, ends, 0.2)
    assert all(x.isfinite().all() for x in (o, lse, *grads))


@interpreted
def test_log_sum_exp(small_tiles):
    q, k, v = (x.detach() for x in packed(2, 14, 2, 32, torch.float32, 0))
    _, lse_BHL = kernels.forward(q, k, v, [1, 5, 14], 0.3)
    scores_BHLL = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) * 0.3
    scale_of_token = torch.tensor([0] + [1] * 4 + [2] * 9)
    scores_BHLL.masked_fill_(scale_of_token[:, None] < scale_of_token[None], -torch.inf)
    torch.testing.assert_close(lse_BHL.double() * torch.tensor(2.0).log(), scores_BHLL.logsumexp(-1), atol=1e-5, rtol=0)


@interpreted
def test_same_bits_in_every_run(small_tiles):
    q, k, v = packed(1, 30, 2, 32, torch.float16, 0)
    first = check(q, k, v, (1, 2, 5), 0.2)
    for before, again in zip(first, check(q, k, v, (1, 2, 5), 0.2)):
        assert torch.equal(before, again)


@interpreted
def test_no_images():
    q, k, v = packed(0, 5, 2, 32, torch.float32, 0)
    out = scale_attention(q, k, v, (1, 2), 0.2, backend="triton")
    out.sum().backward()
    assert out.shape == q.grad.shape == k.grad.shape == v.grad.shape == (0, 5, 2, 32)


@interpreted
def test_opcheck(small_tiles):
    q, k, v = packed(1, 14, 2, 32, torch.float32, 0)
    torch.library.opcheck(torch.ops.var_fast.scale_attention_triton.default, (q, k, v, [1, 5, 14], 0.2))
    q, k, v = (x.detach() for x in (q, k, v))
    o, lse = kernels.forward(q, k, v, [1, 5, 14], 0.2)
    torch.library.opcheck(
        torch.ops.var_fast.scale_attention_backward_triton.default, (v, q, k, v, o, lse, [1, 5, 14], 0.2)
    )


@interpreted
def test_autocast_takes_its_type(small_tiles):
    q, k, v = packed(1, 14, 1, 32, torch.float32, 0)
    with torch.autocast("cpu", dtype=torch.float16):
        out = scale_attention(q, k, v.half(), (1, 2, 3), 0.2, backend="triton")
    assert out.dtype == torch.float16
    assert relative_error(out, scale_attention_reference(q.double(), k.double(), v.double(), (1, 2, 3), 0.2)) < 2e-3
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


@interpreted
def test_compiles_without_a_graph_break(small_tiles):
    q, k, v = packed(1, 14, 1, 32, torch.float32, 0)

    def double(q, k, v):
        return scale_attention(q, k, v, (1, 2, 3), 0.2, backend="triton") * 2

    out = torch.compile(double, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(out, double(q, k, v))
    for one, other in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(double(q, k, v).square().sum(), (q, k, v)),
    ):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------- what the kernels refuse
@interpreted
@pytest.mark.parametrize(
    ("D", "dtype", "softmax_scale", "message"),
    [
        (40, torch.float32, 1.0, "D = 40"),
        (32, torch.float64, 1.0, "torch.float64"),
        (32, torch.float32, 0.0, "softmax_scale is 0.0"),
    ],
)
def test_refused_by_name_but_not_by_auto(D, dtype, softmax_scale, message, monkeypatch):
    q, k, v = (x.detach() for x in packed(1, 5, 1, D, dtype, 0))
    with pytest.raises(BackendUnavailable, match=message):
        scale_attention(q, k, v, (1, 2), softmax_scale, backend="triton")
    assert issubclass(BackendUnavailable, UserError)
    monkeypatch.setitem(FAST_BACKENDS, "scale_attention", {"triton": ("cpu", "cuda")})
    out = scale_attention(q, k, v, (1, 2), softmax_scale)
    assert torch.equal(out, scale_attention_reference(q, k, v, (1, 2), softmax_scale))
    monkeypatch.setenv("VAR_FAST_BACKEND", "triton")
    with pytest.raises(BackendUnavailable, match=message):
        scale_attention(q, k, v, (1, 2), softmax_scale)


# --------------------------------------------------------------------------------------------------------------- GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("patch_nums", "shape"),
    [
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (2, 680, 4, 64)),
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 255, 2, 64)),  # a prefix
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 680, 2, 32)),
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 680, 2, 96)),
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 680, 2, 128)),
        ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), (1, 2240, 2, 64)),
        ((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64), (1, 9451, 1, 64)),
        ((7,), (1, 49, 1, 64)),
        ((1,), (1, 1, 1, 64)),
    ],
    ids=lambda value: "x".join(map(str, value)) if len(value) == 4 else str(len(value)),
)
def test_gpu(dtype, patch_nums, shape, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    q, k, v = packed(*shape, dtype, 0, "cuda")
    first = check(q, k, v, patch_nums, shape[-1] ** -0.5)
    for before, again in zip(first, check(q, k, v, patch_nums, shape[-1] ** -0.5)):
        assert torch.equal(before, again)


@pytest.mark.gpu
def test_gpu_tensorfloat32(monkeypatch):
    """Only where torch allows it, and then to its accuracy."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    for D in (64, 128):
        q, k, v = (x.detach() for x in packed(1, 680, 2, D, torch.float32, 0, "cuda"))
        patch_nums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
        out = scale_attention(q, k, v, patch_nums, D**-0.5, backend="triton")
        expected = scale_attention_reference(q.double(), k.double(), v.double(), patch_nums, D**-0.5)
        assert 1e-6 < relative_error(out, expected) < 2e-3
