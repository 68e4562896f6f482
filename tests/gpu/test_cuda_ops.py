"""The CUDA operators on a GPU against float64 references, at the sizes of d16 and d30 among others; tests/cuda does the
same on the CPU, at sizes that take no time there."""

import pytest
import torch

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
from tests.cuda.device import DeviceOperators

_C = pytest.importorskip("var_fast._C")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _C.has_cuda(), reason="built without the CUDA operators"),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


@pytest.fixture(scope="module")
def ops():
    return DeviceOperators()


@dtypes
@pytest.mark.parametrize("C", [8, 1024, 1032, 1920, 2304, 4608])  # d16, d30, d36
@pytest.mark.parametrize("R, L", [(2, 1), (6, 25), (4, 256)])
def test_residual_adaln_modulate(ops, dtype, C, R, L):
    check_residual_adaln_modulate(ops, dtype, R, L, C, M=R // 2 + 1)
    check_residual_adaln_modulate(ops, dtype, R, L, C, M=R // 2 + 1, residual=False)


def test_residual_adaln_modulate_of_a_float32_branch(ops):
    check_residual_adaln_modulate(ops, torch.bfloat16, R=40, L=169, C=1024, M=21, branch_dtype=torch.float32)


@dtypes
@pytest.mark.parametrize("H, D", [(16, 64), (30, 64), (3, 96), (5, 8), (2, 128)])
@pytest.mark.parametrize("scaled", [True, False])
def test_qk_norm(ops, dtype, H, D, scaled):
    check_qk_norm(ops, dtype, S=3, R=5, l=36, H=H, D=D, begin=55, capacity=155, scaled=scaled)


@dtypes
@pytest.mark.parametrize("H, D", [(16, 64), (30, 64), (4, 32), (4, 96), (4, 128)])
@pytest.mark.parametrize("scale", [0, 2, 3, 5, 6])
def test_scale_attention_of_a_scale(ops, dtype, H, D, scale):
    length = sum(pn * pn for pn in PATCH_NUMS[: scale + 1])
    check_scale_attention(ops, dtype, R=2, l=PATCH_NUMS[scale] ** 2, H=H, D=D, length=length, capacity=680)


@dtypes
def test_scale_attention_of_many_images(ops, dtype):  # two tiles of queries a block
    check_scale_attention(ops, dtype, R=32, l=64, H=16, D=64, length=155, capacity=160)


@dtypes
@pytest.mark.parametrize("length", [257, 680, 2240])
def test_scale_attention_split_over_blocks(ops, dtype, length):
    check_scale_attention(ops, dtype, R=2, l=9, H=3, D=64, length=length, capacity=2240)


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "wide", "outlier", "zeros", "tiny"])
@pytest.mark.parametrize("V, top_k, top_p", [(4096, 900, 0.9613), (4096, 0, 0.9517), (16384, 5000, 0.9), (77, 10, 0.0)])
def test_draw_tokens(ops, kind, V, top_k, top_p):
    for seed in range(3):
        check_draw_tokens(ops, B=4, l=100, V=V, top_k=top_k, top_p=top_p, kind=kind, seed=seed)


def test_draw_tokens_close_calls(ops):
    check_draw_tokens_close_calls(ops)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_draw_tokens_says_where_logits_are_not_finite(ops, value):
    check_draw_tokens_not_finite(ops, value)


@pytest.mark.parametrize("scale", range(len(PATCH_NUMS)))
@pytest.mark.parametrize("codes", [False, True])
def test_pyramid_update(ops, scale, codes):
    pn_next = (*PATCH_NUMS, 0)[scale + 1]
    check_pyramid_update(ops, B=3, C=32, h=16, pn=PATCH_NUMS[scale], pn_next=pn_next, V=4096, codes=codes)


@pytest.mark.parametrize("pn, pn_next", [(13, 18), (18, 24), (24, 32), (32, 0)])
@pytest.mark.parametrize("phi", [True, False])
def test_pyramid_update_of_512_pixels(ops, pn, pn_next, phi):
    check_pyramid_update(ops, B=2, C=32, h=32, pn=pn, pn_next=pn_next, V=4096, phi=phi)


@dtypes
@pytest.mark.parametrize("hw, C", [(256, 640), (4096, 320), (65536, 160), (100, 48)])
def test_group_norm_silu(ops, dtype, hw, C):
    check_group_norm_silu(ops, dtype, B=2, hw=hw, C=C, groups=16 if C == 48 else 32)


def test_group_norm_silu_with_a_large_mean(ops):
    check_group_norm_silu(ops, torch.float32, B=2, hw=4096, C=160, groups=32, mean=300.0)


@dtypes
@pytest.mark.parametrize("hw, C", [(256, 640), (65536, 160), (100, 48)])
@pytest.mark.parametrize("residual, store", [(True, True), (False, False)])
def test_group_norm_silu_of_a_sum(ops, dtype, hw, C, residual, store):
    check_group_norm_silu_of_a_sum(ops, dtype, 2, hw, C, 16 if C == 48 else 32, residual, store)


@dtypes
def test_between_two_norms(ops, dtype):
    check_add_bias_residual(ops, dtype, 65536, 160, bias=True, residual=True)
    check_weave_phases(ops, dtype, B=2, h=64, w=64, C=160)


def test_image_of_taps(ops):
    check_image_of_taps(ops, B=2, h=64, w=96)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("M", [1, 2, 8, 18, 25, 32])
@pytest.mark.parametrize("N, K", [(3072, 1024), (1024, 4096), (1920, 1920), (7680, 1920), (4096, 2304), (100, 264)])
def test_skinny_linear(ops, dtype, M, N, K):
    check_skinny_linear(ops, dtype, M, N, K, gelu=True)
    check_skinny_linear(ops, dtype, M, N, K, bias=False, float_out=True)


@dtypes
@pytest.mark.parametrize("n", [1, 4099, 2**20])
def test_gelu(ops, dtype, n):
    check_gelu(ops, dtype, n)


@pytest.mark.parametrize("repeats", [3])
def test_results_are_the_same_again(ops, repeats):
    """No sum depends on which block is first."""
    for check in (
        lambda: check_group_norm_silu(ops, torch.float32, B=2, hw=16384, C=160, groups=32),
        lambda: check_draw_tokens(ops, B=8, l=64, V=4096, top_k=0, top_p=0.9517),
        lambda: check_scale_attention(ops, torch.float32, R=2, l=16, H=4, D=64, length=2000, capacity=2000),
    ):
        first = check()
        assert all(torch.equal(check(), first) for _ in range(repeats))


def test_a_graph_captures_them(ops):
    """No operator waits for the device or allocates."""
    x = torch.randn(2, 64, 160, device="cuda")
    weight, bias, logits = (
        torch.ones(160, device="cuda"),
        torch.zeros(160, device="cuda"),
        torch.randn(1, 4, 4096).cuda(),
    )
    seeds, bad = torch.zeros(1, dtype=torch.int64).cuda(), torch.zeros(1, 1, dtype=torch.int32).cuda()
    scratch, y = ops.group_norm_silu_scratch(x, 32), torch.empty_like(x)
    idx = torch.empty(1, 4, dtype=torch.int64, device="cuda")

    def run():
        ops.call("group_norm_silu", x, 0, None, None, None, weight, bias, 2, 64, 160, 32, 1e-6, 1, y, 0, scratch)
        ops.call("draw_tokens", logits, seeds, 0, 1, 4, 4096, 900, 0.96, idx, bad)

    run()
    torch.cuda.synchronize()
    expected_y, expected_idx = y.clone(), idx.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    y.zero_(), idx.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected_y) and torch.equal(idx, expected_idx)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("H", [16, 30])
@pytest.mark.parametrize("S, R, l, begin", [(2, 2, 1, 0), (5, 8, 1, 0), (2, 2, 36, 55), (3, 3, 256, 424)])
def test_transformer_blocks(ops, dtype, H, S, R, l, begin):
    check_transformer_blocks(ops, dtype, S, R, l, H, hidden=256 * H, begin=begin)
