"""The native implementations behind the operators: accuracy, any memory layout, when auto takes them, registration.

What the extension computes by address is checked on every instruction set by test_native_isa.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.native_checks import TOLERANCE, TYPES, error
from var_fast import VAR, VQVAE
from var_fast.ops import (
    adaln_modulate,
    adaln_modulate_reference,
    gelu,
    group_norm_silu,
    group_norm_silu_reference,
    pyramid_update,
    pyramid_update_reference,
    qk_norm,
    residual_adaln_modulate,
    residual_adaln_modulate_reference,
)
from var_fast.ops.backend import BackendUnavailable, native_problem

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=str(native_problem()))


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("VAR_FAST_BACKEND", raising=False)


@pytest.fixture
def calls(monkeypatch):
    """Names of the extension's functions in the order in which they ran."""
    import var_fast._C as native

    names = []

    def spy(name, function):
        def call(*args):
            names.append(name)
            return function(*args)

        return call

    forwards = "cpu_residual_adaln_modulate_forward", "cpu_qk_norm_forward", "cpu_gelu"
    for name in (*forwards, "cpu_group_norm_silu", "cpu_pyramid_update"):
        monkeypatch.setattr(native, name, spy(name, getattr(native, name)))
    return names


def gaps(x):
    """Every second column of a map twice as wide."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS = {"contiguous": lambda x: x, "gaps": gaps, "transposed": transposed}
layouts = st.sampled_from(sorted(LAYOUTS))


def double(tensors):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in tensors]


def adaln_inputs(B, L, C, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    maps = [(torch.randn(B, L, C, generator=g) + 1).to(dtype) for _ in range(2)]
    return [*maps, *(torch.randn(B, C, generator=g).to(dtype) for _ in range(3))]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 90),
    st.sampled_from(sorted(TYPES, key=str)),
    layouts,
    st.data(),
)
def test_adaln_modulate(B, L, C, dtype, layout, data):
    inputs = adaln_inputs(B, L, C, dtype, data.draw(st.integers(0, 2**16)))
    x, branch, gate, scale, shift = (LAYOUTS[layout](x) for x in inputs)
    before = x.clone()
    right_x, right_y = residual_adaln_modulate_reference(*double(inputs))
    x_new, y = residual_adaln_modulate(x, branch, gate, scale, shift, backend="native")
    assert x_new.dtype == y.dtype == dtype and torch.equal(x, before)
    assert error(x_new, right_x) < TOLERANCE[dtype]
    # a row of one or two channels may have next to no deviation, which float32 and bfloat16 x no longer hold
    assert C < 3 or error(y, right_y) < TOLERANCE[dtype] or (y.double() - right_y).abs().max() < 1e-4
    y = adaln_modulate(x, scale, shift, backend="native")
    right_y = adaln_modulate_reference(*double([inputs[0], *inputs[3:]]))
    assert y.dtype == dtype and (C < 3 or error(y, right_y) < TOLERANCE[dtype])


def test_float32_stream_and_bfloat16_branch():
    x, branch, gate, scale, shift = adaln_inputs(2, 5, 64, torch.float32, 0)
    branch, gate = branch.bfloat16(), gate.bfloat16()
    right = residual_adaln_modulate_reference(*double([x, branch, gate, scale, shift]))
    found = residual_adaln_modulate(x, branch, gate, scale, shift, backend="native")
    assert all(f.dtype == torch.float32 and error(f, r) < 1e-5 for f, r in zip(found, right))
    with pytest.raises(BackendUnavailable, match="it was given torch.float32 beside torch.bfloat16"):
        residual_adaln_modulate(x.bfloat16(), branch, gate, scale, shift, backend="native")


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 12),
    st.tuples(st.integers(2, 9), st.integers(1, 9)),
    st.sampled_from(["contiguous", "gaps", "transposed", "channels_last"]),
    st.sampled_from(sorted(TYPES, key=str)),
    st.integers(0, 2**16),
)
def test_group_norm_silu(B, groups, per_group, size, layout, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    C = groups * per_group
    x = (2 * torch.randn(B, C, *size, generator=g) + 1).to(dtype)
    weight, bias = torch.randn(2, C, generator=g)
    right = group_norm_silu_reference(x.double(), weight.double(), bias.double(), groups)
    last = layout == "channels_last"
    x = x.to(memory_format=torch.channels_last) if last else LAYOUTS[layout](x)
    y = group_norm_silu(x, weight, bias, groups, backend="native")
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    few = per_group * size[0] * size[1] < 3  # such a group may have next to no deviation
    assert few or error(y, right) < TOLERANCE[dtype] or (y.double() - right).abs().max() < 1e-4


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(1, 9),
    st.integers(1, 14),
    st.booleans(),
    layouts,
    st.integers(0, 2**16),
)
def test_pyramid_update(B, C, size, pn, pn_next, with_phi, layout, seed):
    g = torch.Generator().manual_seed(seed)
    codebook = torch.randn(11, C, generator=g)
    idx = torch.randint(11, (B, pn * pn), generator=g)
    weight, bias = torch.randn(C, C, 3, 3, generator=g) * (9 * C) ** -0.5, torch.randn(C, generator=g)
    phi = (weight, bias, 0.5) if with_phi else (None, None, 0.0)
    f_hat = torch.randn(B, C, *size, generator=g)
    right_f = f_hat.double()
    right_next = pyramid_update_reference(idx, *double([codebook, *phi]), right_f, pn, pn_next)
    phi = tuple(LAYOUTS[layout](x) if torch.is_tensor(x) else x for x in phi)
    f_hat, codebook, idx = (LAYOUTS[layout](x) for x in (f_hat, codebook, idx))
    next_map = pyramid_update(idx, codebook, *phi, f_hat, pn, pn_next, backend="native")
    assert next_map.shape == right_next.shape
    assert error(next_map, right_next) < 1e-5 and error(f_hat, right_f) < 1e-5


def pyramid_inputs(C=4):
    idx, codebook = torch.zeros(1, 4, dtype=torch.int64), torch.randn(5, C)
    return [idx, codebook, torch.randn(C, C, 3, 3), torch.randn(C), 0.5, torch.zeros(1, C, 3, 3), 2, 3]


@pytest.mark.parametrize("bad", [-1, 5])
def test_an_index_of_no_code_is_an_error(bad):
    inputs = pyramid_inputs()
    inputs[0][0, 2] = bad
    with pytest.raises(IndexError, match="expected indices of 5 codes"):
        pyramid_update(*inputs, backend="native")


def test_auto_takes_them_where_no_gradient_is_asked_for(calls):
    images = torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last)
    weight = torch.ones(8, requires_grad=True)
    pyramid = pyramid_inputs()
    pyramid[2].requires_grad_()

    def everything():
        group_norm_silu(images, weight, weight, 4)
        pyramid[5] = torch.zeros_like(pyramid[5])
        pyramid_update(*pyramid)

    everything()
    assert calls == []
    with torch.no_grad():
        everything()
    assert calls == ["cpu_group_norm_silu", "cpu_pyramid_update"]


def test_auto_takes_what_has_a_gradient_always(calls):
    x, branch, gate, scale, shift = adaln_inputs(1, 3, 8, torch.float32, 0)
    scale.requires_grad_()
    adaln_modulate(x, scale, shift)
    with torch.no_grad():
        residual_adaln_modulate(x, branch, gate, scale, shift)
    qk_norm(torch.randn(1, 2, 3, 1, 8, requires_grad=True), torch.ones(1))
    gelu(x.requires_grad_())
    assert calls == ["cpu_residual_adaln_modulate_forward"] * 2 + ["cpu_qk_norm_forward", "cpu_gelu"]


def test_auto_leaves_other_types_and_formats_to_the_reference(calls):
    x, branch, gate, scale, shift = adaln_inputs(1, 3, 8, torch.float64, 0)
    adaln_modulate(x, scale, shift)
    residual_adaln_modulate(x.bfloat16(), branch.float(), gate, scale, shift)
    group_norm_silu(torch.randn(1, 8, 4, 4), torch.ones(8), torch.ones(8), 4)
    inputs = pyramid_inputs()
    pyramid_update(*inputs[:2], torch.randn(4, 4, 5, 5), *inputs[3:])
    assert calls == []


def test_named_native_without_a_gradient_is_an_error_where_one_is_asked_for(monkeypatch):
    pyramid = pyramid_inputs()
    pyramid[1].requires_grad_()
    images, ones = torch.zeros(1, 8, 2, 2, requires_grad=True), torch.ones(8)
    for run in [
        lambda **backend: group_norm_silu(images, ones, ones, 4, **backend),
        lambda **backend: pyramid_update(*pyramid, **backend),
    ]:
        with pytest.raises(BackendUnavailable, match="backend 'native' .* it has no gradient"):
            run(backend="native")
        with monkeypatch.context() as m, pytest.raises(BackendUnavailable, match="VAR_FAST_BACKEND"):
            m.setenv("VAR_FAST_BACKEND", "native")
            run()


@pytest.mark.parametrize("dtype", TYPES)
def test_operators_are_registered_correctly(dtype):
    x, branch, gate, scale, shift = adaln_inputs(2, 3, 8, dtype, 0)
    ops, check = torch.ops.var_fast, torch.library.opcheck
    check(ops.adaln_modulate_native.default, (transposed(x), scale, shift, 1e-6))
    check(ops.residual_adaln_modulate_native.default, (x, transposed(branch), gate, scale, shift, 1e-6))
    images = torch.randn(2, 8, 3, 3).to(dtype)
    for x_BChw in (images, images.to(memory_format=torch.channels_last), gaps(images)):
        check(ops.group_norm_silu_native.default, (x_BChw, torch.ones(8), torch.ones(8), 4, 1e-6))
    for f_hat in (torch.zeros(1, 4, 3, 3), gaps(torch.zeros(1, 4, 3, 3))):
        inputs = pyramid_inputs()
        inputs[5] = f_hat
        check(ops.pyramid_update_native.default, tuple(inputs))


def test_models_are_one_graph_under_torch_compile(calls):
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=64, z_channels=16, ch=32, ch_mult=(1, 1), v_patch_nums=(1, 2, 3), test_mode=True)
    options = dict(num_classes=5, depth=1, embed_dim=64, num_heads=2, patch_nums=(1, 2, 3), attn_l2_norm=True)
    var = VAR(vae, **options).eval().requires_grad_(False)
    f_hat = torch.randn(1, 16, 3, 3).to(memory_format=torch.channels_last)
    decoder = vae.decoder.to(memory_format=torch.channels_last)
    label, x = torch.tensor([1]), torch.randn(1, 13, 16)
    with torch.no_grad():
        for model, inputs in ((var, (label, x)), (decoder, (f_hat,))):
            right = model(*inputs)
            calls.clear()
            found = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
            assert calls
            torch.testing.assert_close(found, right)
