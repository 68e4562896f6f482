"""The kernels of csrc/cuda, run on the CPU, against float64 references; tests/gpu/test_cuda_ops.py is the same on a
GPU."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cuda.checks import (
    DTYPES,
    check_add_bias_residual,
    check_draw_tokens,
    check_draw_tokens_close_calls,
    check_draw_tokens_not_finite,
    check_gelu,
    check_group_norm_silu,
    check_group_norm_silu_of_a_sum,
    check_image_of_taps,
    check_pyramid_update,
    check_qk_norm,
    check_residual_adaln_modulate,
    check_scale_attention,
    check_skinny_linear,
    check_transformer_blocks,
    check_weave_phases,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
seeds = st.integers(0, 2**20)


def few(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16) if tensor.element_size() == 2 else tensor


# ---------------------------------------------------------------------------------------------- residual_adaln_modulate
@dtypes
@pytest.mark.parametrize("C", [8, 40, 248, 256, 1032])
def test_residual_adaln_modulate(ops, dtype, C):
    check_residual_adaln_modulate(ops, dtype, R=3, L=2, C=C, M=2)
    check_residual_adaln_modulate(ops, dtype, R=2, L=3, C=C, M=2, residual=False)


def test_residual_adaln_modulate_of_the_widest_rows(ops):
    check_residual_adaln_modulate(ops, torch.bfloat16, R=1, L=2, C=4608, M=1)


def test_residual_adaln_modulate_with_several_rows_a_block(ops, every_order):
    every_order(lambda: bits(check_residual_adaln_modulate(ops, torch.float16, R=5, L=1230, C=8, M=5)))


@pytest.mark.parametrize(
    "C, stride, message", [(12, 96, "C a multiple of 8"), (4616, 0, "up to 4608"), (8, 50, "stride")]
)
def test_residual_adaln_modulate_refuses(ops, C, stride, message):
    x, row = ops.place(torch.zeros(1, 1, C)), ops.place(torch.zeros(1, C))
    with pytest.raises(RuntimeError, match=f"residual_adaln_modulate: expected .*{message}"):
        ops.residual_adaln_modulate(x, None, row, row, row, stride, 1e-6, torch.float32)


# -------------------------------------------------------------------------------------------------------------- qk_norm
@dtypes
@given(
    D=st.integers(1, 16).map(lambda n: 8 * n),
    H=st.integers(1, 5),
    l=st.integers(1, 4),
    seed=seeds,
    scaled=st.booleans(),
)
@few(15)
def test_qk_norm(ops, dtype, D, H, l, seed, scaled):
    check_qk_norm(ops, dtype, S=2, R=2, l=l, H=H, D=D, begin=2, capacity=7, scaled=scaled, seed=seed)


def test_qk_norm_of_a_shared_null_class(ops):
    check_qk_norm(ops, torch.bfloat16, S=3, R=5, l=1, H=2, D=64, begin=0, capacity=1)


def test_qk_norm_beyond_the_cache(ops):
    with pytest.raises(RuntimeError, match="capacity"):
        check_qk_norm(ops, torch.float32, S=1, R=1, l=3, H=1, D=8, begin=2, capacity=4)


# ------------------------------------------------------------------------------------------------------ scale_attention
@dtypes
@pytest.mark.parametrize("D", [32, 64, 96, 128])
def test_scale_attention(ops, dtype, D):
    check_scale_attention(ops, dtype, R=2, l=3, H=2, D=D, length=21, capacity=30)


@dtypes
@given(l=st.integers(1, 40), length=st.integers(1, 150), seed=seeds, sharpness=st.sampled_from([0.1, 1.0, 10.0]))
@few(20)
def test_scale_attention_at_odd_sizes(ops, dtype, l, length, seed, sharpness):
    check_scale_attention(
        ops, dtype, R=1, l=l, H=1, D=32, length=length, capacity=length + seed % 3, seed=seed, sharpness=sharpness
    )


@dtypes
def test_scale_attention_split_over_blocks(ops, dtype, every_order):
    every_order(lambda: bits(check_scale_attention(ops, dtype, R=1, l=17, H=2, D=32, length=530, capacity=540)))


def test_scale_attention_with_two_tiles_a_block(ops, every_order):
    assert 18 * 19 * 3 >= 1024
    every_order(lambda: bits(check_scale_attention(ops, torch.bfloat16, R=18, l=33, H=19, D=32, length=5, capacity=5)))


@dtypes
def test_scale_attention_does_not_depend_on_the_batch(ops, dtype):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 20, 2, 32, generator=g).to(dtype)
    caches = torch.randn(2, 3, 2, 50, 32, generator=g).to(dtype)
    together = ops.scale_attention(ops.place(q), *map(ops.place, caches), 45)
    alone = ops.scale_attention(ops.place(q[2:]), *(ops.place(cache[2:]) for cache in caches), 45)
    assert torch.equal(together[2:], alone)


def test_scale_attention_refuses(ops):
    with pytest.raises(RuntimeError, match="scale_attention: expected D 32, 64, 96 or 128"):
        check_scale_attention(ops, torch.float32, R=1, l=1, H=1, D=48, length=3, capacity=3)


# ---------------------------------------------------------------------------------------------------------- draw_tokens
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "wide", "outlier", "zeros", "tiny"])
@given(
    V=st.integers(1, 90) | st.integers(500, 1100),
    top_k=st.sampled_from([0, 1, 2, 10, 60, 600, 5000]),
    # no round numbers: a share that meets 1 - top_p exactly may go either way
    top_p=st.sampled_from([0.0, 0.00123, 0.2517, 0.5023, 0.9017, 0.9613, 0.99917, 1.0]),
    seed=seeds,
)
@few(40)
def test_draw_tokens(ops, kind, V, top_k, top_p, seed):
    check_draw_tokens(ops, B=2, l=3, V=V, top_k=top_k, top_p=top_p, kind=kind, seed=seed)


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75, 1 - 2**-6])
def test_draw_tokens_drops_the_first_of_those_that_tie(ops, top_p):
    for seed in range(20):
        check_draw_tokens(ops, B=1, l=16, V=64, top_k=0, top_p=top_p, kind="equal", seed=seed)


def test_draw_tokens_keeps_the_best(ops):
    for seed in range(5):
        check_draw_tokens(ops, B=2, l=3, V=50, top_k=0, top_p=1e-17, seed=seed)


@pytest.mark.parametrize("V, top_k, top_p", [(4096, 900, 0.96), (4096, 0, 0.95), (16384, 5000, 0.9), (4099, 0, 0.0)])
def test_draw_tokens_of_large_codebooks(ops, every_order, V, top_k, top_p):
    every_order(lambda: check_draw_tokens(ops, B=2, l=2, V=V, top_k=top_k, top_p=top_p, kind="ties", seed=V))


def test_draw_tokens_close_calls(ops):
    check_draw_tokens_close_calls(ops)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_draw_tokens_says_where_logits_are_not_finite(ops, value):
    check_draw_tokens_not_finite(ops, value)


@pytest.mark.parametrize("V, top_k, top_p", [(16385, 0, 0.0), (4, -1, 0.0), (4, 0, 1.5)])
def test_draw_tokens_refuses(ops, V, top_k, top_p):
    bad = ops.place(torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="draw_tokens: expected"):
        ops.draw_tokens(
            ops.place(torch.zeros(1, 1, V)), ops.place(torch.zeros(1, dtype=torch.int64)), 0, top_k, top_p, bad
        )


# ------------------------------------------------------------------------------------------------------- pyramid_update
@pytest.mark.parametrize("pn, pn_next", [(1, 2), (3, 4), (5, 6), (10, 13), (16, 0)])
def test_pyramid_update(ops, pn, pn_next):
    check_pyramid_update(ops, B=2, C=32, h=16, pn=pn, pn_next=pn_next)


@given(C=st.integers(1, 37), h=st.integers(1, 13), phi=st.booleans(), codes=st.booleans(), seed=seeds)
@few(12)
def test_pyramid_update_at_odd_sizes(ops, C, h, phi, codes, seed):
    pn, pn_next = seed % h + 1, seed // h % h + 1
    check_pyramid_update(ops, B=1, C=C, h=h, pn=pn, pn_next=pn_next, phi=phi, codes=codes, seed=seed)


def test_pyramid_update_of_512_pixels(ops, every_order):  # codes are not staged in shared memory
    every_order(lambda: check_pyramid_update(ops, B=1, C=32, h=32, pn=18, pn_next=24))


def test_pyramid_update_of_a_map_that_does_not_fit(ops):
    with pytest.raises(RuntimeError, match="pyramid_update"):
        check_pyramid_update(ops, B=1, C=64, h=40, pn=2, pn_next=3)


# ------------------------------------------------------------------------------------------------------ group_norm_silu
@dtypes
@pytest.mark.parametrize("C, groups", [(160, 32), (64, 32), (24, 8), (30, 5)])
def test_group_norm_silu(ops, dtype, C, groups):
    check_group_norm_silu(ops, dtype, B=2, hw=37, C=C, groups=groups)
    check_group_norm_silu(ops, dtype, B=1, hw=1, C=C, groups=groups, silu=False)


@dtypes
@pytest.mark.parametrize("y_dtype", DTYPES)
def test_group_norm_silu_of_several_parts(ops, dtype, y_dtype, every_order):
    every_order(lambda: bits(check_group_norm_silu(ops, dtype, B=2, hw=611, C=32, groups=8, y_dtype=y_dtype)))


def test_group_norm_silu_with_a_large_mean(ops):
    check_group_norm_silu(ops, torch.float32, B=1, hw=600, C=32, groups=8, mean=300.0)


def test_group_norm_silu_does_not_depend_on_the_batch(ops):
    x = torch.randn(3, 600, 32, generator=torch.Generator().manual_seed(0))
    weight, bias = ops.place(torch.randn(32)), ops.place(torch.randn(32))

    def run(part):
        return ops.group_norm_silu(ops.place(part), weight, bias, 8, 1e-6, True, torch.float32)

    assert torch.equal(run(x)[2:], run(x[2:]))


@dtypes
@pytest.mark.parametrize("C, groups", [(160, 32), (30, 5)])
@pytest.mark.parametrize("residual, store", [(True, True), (False, True), (False, False)])
def test_group_norm_silu_of_a_sum(ops, dtype, C, groups, residual, store, every_order):
    every_order(lambda: bits(check_group_norm_silu_of_a_sum(ops, dtype, 2, 211, C, groups, residual, store)))


def test_group_norm_silu_refuses_a_residual_without_a_place_for_the_sum(ops):
    x, row = ops.place(torch.zeros(1, 2, 32)), ops.place(torch.zeros(32))
    for sum_, message in ((None, "a place for the sum"), (x, "in a place of its own")):
        with pytest.raises(RuntimeError, match=f"group_norm_silu: expected .*{message}"):
            ops.group_norm_silu(x, row, row, 8, 1e-6, True, torch.float32, before=(row, x, sum_))


# ------------------------------------------------------------------------------------------------------- skinny_linear
halves = pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype).removeprefix("torch."))


@halves
@given(
    M=st.integers(1, 32),
    N=st.integers(1, 40),
    K=st.integers(1, 40).map(lambda n: 8 * n),
    gelu=st.booleans(),
    bias=st.booleans(),
    float_out=st.booleans(),
    seed=seeds,
)
@few(20)
def test_skinny_linear(ops, dtype, M, N, K, gelu, bias, float_out, seed):
    check_skinny_linear(ops, dtype, M, N, K, gelu, bias, float_out, seed)


def test_skinny_linear_of_a_deep_layer(ops, every_order):
    every_order(lambda: bits(check_skinny_linear(ops, torch.bfloat16, M=3, N=16, K=8 * 640)))
    check_skinny_linear(ops, torch.bfloat16, M=3, N=16 * 265, K=1536)  # of more blocks than fit side by side


def test_a_row_of_skinny_linear_does_not_depend_on_the_others(ops):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(30, 512, generator=g).bfloat16(), ops.place(torch.randn(16, 512, generator=g).bfloat16())
    together = ops.skinny_linear(ops.place(x), weight, None, False, torch.float32)
    assert torch.equal(ops.skinny_linear(ops.place(x[20:21]), weight, None, False, torch.float32), together[20:21])


@pytest.mark.parametrize(
    "M, K, dtype, message", [(33, 8, torch.bfloat16, "32 rows"), (1, 12, torch.float16, "K a mul")]
)
def test_skinny_linear_refuses(ops, M, K, dtype, message):
    x, weight = ops.place(torch.zeros(M, K, dtype=dtype)), ops.place(torch.zeros(16, K, dtype=dtype))
    with pytest.raises(RuntimeError, match=f"skinny_linear: expected .*{message}"):
        ops.skinny_linear(x, weight, None, False, dtype)


# --------------------------------------------------------------------------------------------------- add_bias_residual
@dtypes
@pytest.mark.parametrize("C", [160, 30])
@pytest.mark.parametrize("bias, residual", [(True, True), (True, False), (False, True)])
def test_add_bias_residual(ops, dtype, C, bias, residual):
    check_add_bias_residual(ops, dtype, 37, C, bias, residual)


# -------------------------------------------------------------------------------------------------------- weave_phases
@dtypes
@pytest.mark.parametrize("C", [32, 30])
def test_weave_phases(ops, dtype, C):
    check_weave_phases(ops, dtype, B=2, h=3, w=5, C=C)


# ------------------------------------------------------------------------------------------------------- image_of_taps
@pytest.mark.parametrize("h, w", [(1, 1), (2, 5), (16, 17)])
def test_image_of_taps(ops, h, w):
    check_image_of_taps(ops, B=2, h=h, w=w)


# ----------------------------------------------------------------------------------------------------------------- gelu
@dtypes
@pytest.mark.parametrize("n", [1, 7, 8, 4099])
def test_gelu(ops, dtype, n):
    check_gelu(ops, dtype, n)


@dtypes
def test_gelu_far_out(ops, dtype):
    x = ops.place(torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0]).to(dtype))
    assert torch.equal(ops.gelu(x), torch.tensor([-0.0, -0.0, 0.0, 20.0, 200.0]).to(dtype))


# --------------------------------------------------------------------------------------------------- transformer_blocks
@halves
@pytest.mark.parametrize("S, R, l, begin", [(3, 4, 1, 0), (2, 2, 4, 5), (2, 2, 25, 30), (3, 3, 49, 91)])
def test_transformer_blocks(ops, dtype, S, R, l, begin):
    check_transformer_blocks(ops, dtype, S, R, l, H=2, hidden=512, begin=begin)


def test_transformer_blocks_of_odd_sizes(ops):
    check_transformer_blocks(
        ops, torch.bfloat16, S=1, R=1, l=9, H=1, hidden=200, begin=5, depth=1, scaled=False, biases=False
    )
    check_transformer_blocks(ops, torch.float16, S=1, R=1, l=17, H=3, hidden=264, begin=1, depth=3)


def test_transformer_blocks_in_any_order(ops, every_order):
    every_order(lambda: check_transformer_blocks(ops, torch.float16, S=2, R=2, l=49, H=2, hidden=64, begin=14, depth=1))


@pytest.mark.parametrize(
    "dtype, H, l, hidden, message",
    [
        (torch.float32, 1, 1, 64, "bfloat16 or float16"),
        (torch.float16, 81, 1, 64, "at most 80 heads"),
        (torch.float16, 1, 1, 60, "hidden a multiple of 8"),
        (torch.float16, 1, 1025, 64, "at most 1024 tokens"),
    ],
)
def test_transformer_blocks_refuses(ops, dtype, H, l, hidden, message):
    C = 64 * H
    x = ops.place(torch.zeros(1, l, C))
    block = [None] * 9 + [ops.place(torch.zeros(1, 6, C))]
    caches = [(ops.place(torch.zeros(1, H, l, 64, dtype=dtype)),) * 2]
    with pytest.raises(RuntimeError, match=f"transformer_blocks: expected .*{message}"):
        ops.transformer_blocks(x, [block], caches, 0, 1e-6, 1.0, hidden)
