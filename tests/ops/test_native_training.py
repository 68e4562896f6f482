"""What the CPU computes in training: results and gradients against references in float64, the same bits each time."""

from __future__ import annotations

import platform

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ops.native_checks import TOLERANCE, TYPES
from tests.ops.on_isa import ISAS, rerun_on
from tests.ops.test_scale_attention import masked_softmax
from var_fast import VAR, VQVAE
from var_fast.ops import (
    adaln_modulate,
    adaln_modulate_reference,
    gelu,
    gelu_reference,
    qk_norm,
    qk_norm_reference,
    residual_adaln_modulate,
    residual_adaln_modulate_reference,
    scale_attention,
    scale_attention_reference,
)
from var_fast.ops.scale_attention import _PrefixAttention

types, seeds = st.sampled_from(sorted(TYPES, key=str)), st.integers(0, 2**16)


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("VAR_FAST_BACKEND", raising=False)


def maps(seed, *shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def results(run, inputs):
    """[results, gradients of all inputs] for random upstream gradients, which are exact in every type."""
    found = run(*inputs)
    found = (found,) if isinstance(found, torch.Tensor) else found
    g = torch.Generator().manual_seed(2**40)
    upstream = [torch.randn(t.shape, generator=g).bfloat16().to(t.dtype) for t in found]
    return [*found, *torch.autograd.grad(found, inputs, upstream)]


def compare(run, reference, inputs, factor=1.0):
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found, right = results(run, inputs), results(reference, exact)
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert a.shape == b.shape and a.dtype in (torch.float32, inputs[0].dtype)
        error = ((a.double() - b).norm() / b.norm().clamp_min(1e-3 * b.numel() ** 0.5)).item()
        assert error <= factor * TOLERANCE[inputs[0].dtype], f"{i}: {error:.1e}"
    return found


def on_threads(run, inputs, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return results(run, inputs)
    finally:
        torch.set_num_threads(before)


def same_bits_on_any_threads(run, inputs):
    one = on_threads(run, inputs, 1)
    for threads in (1, 2, 5):
        assert all(map(torch.equal, one, on_threads(run, inputs, threads)))


def native(op):
    return lambda *inputs: op(*inputs, backend="native")


# --------------------------------------------------------------------------------------------------------------- adaln
def adaln_inputs(seed, B, L, C, dtype, branch_dtype=None):
    x, branch, *per_image = maps(seed, (B, L, C), (B, L, C), (B, C), (B, C), (B, C), dtype=dtype)
    branch = branch.detach().to(branch_dtype or dtype).requires_grad_()
    return [x, branch, *per_image]


# few channels may have next to no deviation by chance
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(8, 90), types, seeds)
@example(2, 150, 40, torch.float32, 0)  # several chunks of rows
@example(2, 150, 40, torch.bfloat16, 0)
def test_adaln_modulate(B, L, C, dtype, seed):
    inputs = adaln_inputs(seed, B, L, C, dtype)
    compare(native(residual_adaln_modulate), residual_adaln_modulate_reference, inputs, 2)
    compare(native(adaln_modulate), adaln_modulate_reference, [inputs[0], *inputs[3:]], 2)


def test_adaln_modulate_of_a_bfloat16_branch():
    inputs = adaln_inputs(1, 2, 9, 40, torch.float32, torch.bfloat16)
    found = results(native(residual_adaln_modulate), inputs)
    assert found[0].dtype == torch.float32 and found[3].dtype == torch.bfloat16
    exact = [t.detach().double().requires_grad_() for t in inputs]
    right = results(residual_adaln_modulate_reference, exact)
    for i, (a, b) in enumerate(zip(found, right, strict=True)):
        assert (a.double() - b).norm() < (1e-2 if i == 3 else 2e-5) * b.norm()


def test_adaln_modulate_with_a_large_mean():
    x, _, _, scale, shift = adaln_inputs(2, 2, 5, 300, torch.float32)
    x = (x.detach() + 1000).requires_grad_()
    compare(native(adaln_modulate), adaln_modulate_reference, [x, scale, shift], 3)


def test_adaln_modulate_has_the_same_bits_on_any_threads():
    inputs = adaln_inputs(3, 3, 131, 33, torch.float32)
    same_bits_on_any_threads(native(residual_adaln_modulate), inputs)
    same_bits_on_any_threads(native(adaln_modulate), [inputs[0], *inputs[3:]])


def test_adaln_modulate_of_any_memory_layout():
    x, branch, gate, scale, shift = adaln_inputs(4, 2, 6, 8, torch.float32)
    expected = results(native(residual_adaln_modulate), [x, branch, gate, scale, shift])

    def strided(x, branch, gate, scale, shift):
        x, branch = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, branch))
        gate, scale = (torch.stack((m, m), dim=-1)[..., 0] for m in (gate, scale))
        return residual_adaln_modulate(x, branch, gate, scale, shift, backend="native")

    found = results(strided, [x, branch, gate, scale, shift])
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("B, L", [(0, 3), (2, 0)])
def test_adaln_modulate_and_qk_norm_of_nothing(B, L):
    inputs = adaln_inputs(6, B, L, 8, torch.float32)
    *_, dgate, dscale, dshift = results(native(residual_adaln_modulate), inputs)
    assert all(torch.equal(g, torch.zeros(B, 8)) for g in (dgate, dscale, dshift))
    *_, dscale, dshift = results(native(adaln_modulate), [inputs[0], *inputs[3:]])
    assert torch.equal(dscale, torch.zeros(B, 8)) and torch.equal(dshift, torch.zeros(B, 8))
    assert torch.equal(results(native(qk_norm), qk_norm_inputs(6, B, L, 2, 8, torch.float32))[-1], torch.zeros(2))


def test_a_gradient_of_one_result_only():
    x, branch, gate, scale, shift = adaln_inputs(5, 2, 6, 8, torch.float32)
    for which in (0, 1):
        outs = residual_adaln_modulate(x, branch, gate, scale, shift, backend="native")
        right = residual_adaln_modulate_reference(x, branch, gate, scale, shift)
        g = torch.autograd.grad(outs[which].sum(), [x, branch, gate])
        for a, b in zip(g, torch.autograd.grad(right[which].sum(), [x, branch, gate]), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- qk_norm
def qk_norm_inputs(seed, B, L, H, D, dtype):
    (qkv,) = maps(seed, (B, L, 3, H, D), dtype=dtype)
    scale_H = (torch.rand(H, generator=torch.Generator().manual_seed(seed)) * 10 + 0.1).requires_grad_()
    return [qkv, scale_H]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), st.integers(2, 70), types, seeds)
@example(2, 100, 3, 64, torch.float32, 0)
def test_qk_norm(B, L, H, D, dtype, seed):
    inputs = qk_norm_inputs(seed, B, L, H, D, dtype)
    q, k, v, *_ = compare(native(qk_norm), qk_norm_reference, inputs, 2)
    assert q.dtype == k.dtype == v.dtype == dtype
    assert v.data_ptr() == inputs[0][:, :, 2].data_ptr()


def test_qk_norm_of_upstream_gradients_in_attentions_layout():
    """Gradients that come as (B, H, L, D) with heads before tokens, and one with gaps between channels."""
    qkv, scale_H = qk_norm_inputs(1, 2, 7, 3, 8, torch.float32)
    g = [torch.randn(2, 3, 7, 8).transpose(1, 2), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 16)[..., ::2]]
    found = torch.autograd.grad(qk_norm(qkv, scale_H, backend="native"), [qkv, scale_H], g)
    right = torch.autograd.grad(qk_norm_reference(qkv, scale_H), [qkv, scale_H], g)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_qk_norm_of_nothing():
    """A head of zeros: as F.normalize, whose result and gradient are finite there."""
    qkv, scale_H = qk_norm_inputs(2, 1, 2, 2, 8, torch.float32)
    with torch.no_grad():
        qkv[0, 1, :2, 1] = 0
    compare(native(qk_norm), qk_norm_reference, [qkv, scale_H], 2)


def test_qk_norm_has_the_same_bits_on_any_threads():
    same_bits_on_any_threads(native(qk_norm), qk_norm_inputs(3, 3, 131, 3, 33, torch.float32))


# ---------------------------------------------------------------------------------------------------------------- gelu
@settings(deadline=None, max_examples=30)
@given(st.integers(64, 3000), types, st.sampled_from([0.1, 1.0, 6.0]), seeds)
def test_gelu(n, dtype, spread, seed):
    (x,) = maps(seed, (n,), dtype=dtype)
    x = (x.detach() * spread).requires_grad_()
    compare(native(gelu), gelu_reference, [x])


def test_gelu_slope_everywhere():
    """Each value to a few units of its type, where the slope is not next to nothing."""
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        x = torch.cat((torch.linspace(-12, 12, 50_001), torch.tensor([-1e30, -1e4, -31.0, 31.0, 1e4, 1e30])))
        x = x.to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(gelu(x, backend="native").sum(), x)
        exact = x.detach().double().clamp(-1e3, 1e3).requires_grad_()
        (right,) = torch.autograd.grad(F.gelu(exact, approximate="tanh").sum(), exact)
        assert ((slope.double() - right).abs() <= limit * right.abs() + limit / 4).all()


def test_gelu_of_a_transposed_map_and_of_none():
    (x,) = maps(0, (5, 7))
    torch.testing.assert_close(gelu(x.t(), backend="native"), gelu_reference(x.t()), atol=1e-6, rtol=1e-5)
    assert gelu(torch.zeros(0, 3), backend="native").shape == (0, 3)


# ----------------------------------------------------------------------------------------------------- scale_attention
# a token that sees itself alone has gradients of zero in q and k
pyramids = st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True).map(sorted).filter(lambda pns: pns != [1])


@settings(deadline=None, max_examples=30)
@given(pyramids, st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 8, 40, 64]), types, seeds)
def test_scale_attention(patch_nums, B, H, D, dtype, seed):
    L = sum(pn * pn for pn in patch_nums)
    inputs = maps(seed, *[(B, L, H, D)] * 3, dtype=dtype)

    def run(q, k, v):
        return scale_attention(q, k, v, patch_nums, 0.2)

    o_BLHD, *_ = compare(run, lambda q, k, v: masked_softmax(q, k, v, patch_nums, 0.2), inputs, 2)
    assert "PrefixAttention" in run(*inputs).grad_fn.name() and o_BLHD.is_contiguous()


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("layout", ["gaps", "channels first", "expanded"])
def test_scale_attention_of_any_memory_layout(which, layout):
    inputs = maps(3, *[(2, 14, 3, 8)] * 3)
    lay = {
        "gaps": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0],
        "channels first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    }[layout]

    def run(attention):
        def call(*tensors):
            return attention(*(lay(t) if i == which else t for i, t in enumerate(tensors)), (1, 2, 3), 0.2)

        return call

    compare(run(scale_attention), run(masked_softmax), inputs, 2)


def test_scale_attention_of_one_token():
    q, k, v = maps(6, *[(2, 1, 3, 40)] * 3)
    o, dq, dk, dv = results(lambda *t: scale_attention(*t, (1,), 0.2), [q, k, v])
    assert torch.equal(o, v) and max(dq.abs().max(), dk.abs().max()) < 1e-5 < dv.abs().max()


def test_scale_attention_of_nothing_and_of_two_types_is_the_references_affair():
    q, k, v = maps(4, *[(0, 5, 2, 8)] * 3)
    assert scale_attention(q, k, v, (1, 2), 0.2).shape == (0, 5, 2, 8)
    q, k, v = maps(4, *[(1, 5, 2, 8)] * 3)
    with pytest.raises(RuntimeError, match="dtype"):
        scale_attention(q, k.bfloat16(), v, (1, 2), 0.2)


def test_scale_attention_without_gradients_is_the_reference(monkeypatch):
    monkeypatch.setattr(_PrefixAttention, "apply", None)
    q, k, v = maps(5, *[(1, 5, 2, 8)] * 3)
    with torch.no_grad():
        scale_attention(q, k, v, (1, 2), 0.2)
    scale_attention(q.detach(), k.detach(), v.detach(), (1, 2), 0.2)


def test_scale_attention_of_a_prefix_and_under_autocast():
    q, k, v = maps(1, *[(2, 14, 2, 16)] * 3)
    half = [t.detach().bfloat16().double().requires_grad_() for t in (q, k, v)]
    right = results(lambda *t: scale_attention_reference(*t, (1, 2, 3), 0.2), half)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lambda *t: scale_attention(*t, (1, 2, 3, 4), 0.2), [q, k, v])
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    for a, b in zip(found, right, strict=True):
        assert (a.double() - b).norm() < 2e-2 * b.norm()


def test_scale_attention_by_name_is_the_reference():
    q, k, v = maps(2, *[(1, 5, 1, 8)] * 3)
    out = scale_attention(q, k, v, (1, 2), 0.5, backend="reference")
    assert "PrefixAttention" not in out.grad_fn.name()
    torch.testing.assert_close(out, scale_attention(q, k, v, (1, 2), 0.5))


# ------------------------------------------------------------------------------------------------------------ together
@pytest.mark.parametrize("dtype", TYPES)
def test_operators_are_registered_correctly(dtype):
    x, branch, gate, scale, shift = adaln_inputs(0, 2, 3, 8, dtype)
    ops, check = torch.ops.var_fast, torch.library.opcheck
    check(ops.adaln_modulate_native.default, (x, scale, shift, 1e-6))
    check(ops.residual_adaln_modulate_native.default, (x, branch, gate, scale, shift, 1e-6))
    check(ops.gelu_native.default, (x,))
    plain = [t.detach() for t in (x, branch, gate, scale, shift)]
    check(ops.adaln_modulate_backward_native.default, (plain[1], plain[0], plain[3], 1e-6))
    check(
        ops.residual_adaln_modulate_backward_native.default, (plain[0], plain[1], plain[1], plain[0], *plain[2:4], 1e-6)
    )
    check(ops.gelu_backward_native.default, (plain[0], plain[1]))
    qkv, scale_H = (t.detach() for t in qk_norm_inputs(0, 2, 3, 2, 8, dtype))
    check(ops.qk_norm_native.default, (qkv, scale_H))
    check(ops.qk_norm_backward_native.default, (*qkv.unbind(2), qkv, scale_H))


def small_model():
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=64, z_channels=16, ch=32, ch_mult=(1, 1), v_patch_nums=(1, 2, 3), test_mode=True)
    options = dict(num_classes=5, depth=2, embed_dim=64, num_heads=2, patch_nums=(1, 2, 3), attn_l2_norm=True)
    var = VAR(vae, cond_drop_rate=0.0, **options)
    var.init_weights(init_adaln_gamma=0.5, init_head=1.0)
    tokens = [torch.randint(64, (3, pn * pn)) for pn in (1, 2, 3)]
    return var, (torch.tensor([1, 4, 0]), vae.quantize.idxBl_to_var_input(tokens), torch.cat(tokens, dim=1))


def loss_and_gradients(var, loss, inputs):
    value = loss(*inputs)[0]
    return [value, *torch.autograd.grad(value, list(var.parameters()))]


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_models_gradients(monkeypatch, dtype, tolerance):
    var, inputs = small_model()
    monkeypatch.setenv("VAR_FAST_BACKEND", "reference")
    right = loss_and_gradients(var, var.loss, inputs)
    monkeypatch.delenv("VAR_FAST_BACKEND")
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        found = loss_and_gradients(var, var.loss, inputs)
    assert abs(found[0] - right[0]) < tolerance * right[0]
    found, right = (torch.cat([g.flatten() for g in gs[1:]]) for gs in (found, right))
    assert (found - right).norm() < tolerance * right.norm()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_graph_under_torch_compile(dtype):
    var, inputs = small_model()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        right = loss_and_gradients(var, var.loss, inputs)
        found = loss_and_gradients(var, torch.compile(var.loss, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 if dtype is None else 1e-2, rtol=1e-3)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only")
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa):
    """What the extension computes; attention is torch's."""
    rerun_on(isa, __file__, "adaln or qk_norm or gelu")
