"""The native bfloat16 linear layer in AMX tiles: exact where rounding is, near float64 elsewhere, a row the same in any
batch and on any threads."""

import platform

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ops.on_isa import start_on
from tests.ops.test_native_linear import random_case, relative_error
from var_fast import _C

GUARD = 12352.0  # exact in bfloat16
needs_amx = pytest.mark.skipif(_C.cpu_isa() != "amx", reason=f"{_C.cpu_isa()} has no AMX")


def pack(weight, threads=1):
    """weight (N, K) bfloat16 -> what linear_bf16 reads."""
    N, K = weight.shape
    elements = _C.cpu_linear_bf16_packed_bytes(N, K) // 2
    packed = torch.full((elements + 64,), GUARD, dtype=torch.bfloat16)
    _C.cpu_linear_bf16_pack(weight.data_ptr(), N, K, packed.data_ptr(), threads)
    assert torch.all(packed[elements:] == GUARD)
    return packed


def native(x, packed, bias, N, gelu=False, threads=1):
    """linear_bf16(x (M, K)) -> (M, N); nothing but those M x N elements may be written."""
    M, K = x.shape
    y = torch.full((M * N + 64,), GUARD, dtype=torch.bfloat16)
    bias_address = 0 if bias is None else bias.data_ptr()
    _C.cpu_linear_bf16(x.data_ptr(), packed.data_ptr(), bias_address, M, N, K, gelu, y.data_ptr(), threads)
    assert torch.all(y[M * N :] == GUARD)
    return y[: M * N].reshape(M, N)


def bfloat16_case(seed, M, N, K, bias=True):
    """x and weight in bfloat16, bias in float32"""
    x, weight, b = random_case(seed, M, N, K, bias)
    return x.bfloat16(), weight.bfloat16(), b


SHAPES = (st.integers(1, 70), st.integers(1, 100), st.integers(1, 300), st.booleans(), st.integers(1, 5))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 100), st.integers(1, 300), st.integers(1, 5))
@example(1, 1, 1)
@example(64, 64, 2)
def test_each_weight_has_one_place_and_the_others_are_zero(N, K, threads):
    weight = torch.arange(1, N * K + 1, dtype=torch.int32).reshape(N, K) % 251 + 1
    packed = pack(weight.bfloat16(), threads)
    panels, steps = -(-N // 32), -(-K // 32)
    tiles = packed[: panels * steps * 1024].reshape(panels, steps, 2, 16, 16, 2).float()
    back = tiles.permute(0, 2, 4, 1, 3, 5).reshape(panels * 32, steps * 32)
    expected = F.pad(weight.float(), (0, steps * 32 - K, 0, panels * 32 - N))
    assert torch.equal(back, expected)


@needs_amx
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), *SHAPES)
@example(0, 1, 1, 1, False, 1)
@example(0, 32, 64, 64, True, 1)
@example(0, 300, 40, 100, True, 2)  # more than a block of rows
@example(0, 17, 40, 2100, True, 2)  # several chunks of inputs
@example(0, 300, 70, 2100, True, 2)  # x in several spans of chunks
@example(0, 40, 33, 100, True, 5)  # more threads than panels
def test_exact_where_nothing_is_rounded(seed, M, N, K, bias, threads):
    """Whole numbers of a size that float32 sums hold; results that bfloat16 does not hold are rounded once."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randint(-9, 10, (M, K), generator=g), torch.randint(-9, 10, (N, K), generator=g)
    b = torch.randint(-99, 100, (N,), generator=g) if bias else None
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    out = native(x.bfloat16(), pack(weight.bfloat16()), None if b is None else b.float(), N, threads=threads)
    assert torch.equal(out, expected.bfloat16())


@needs_amx
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), *SHAPES)
def test_matches_float64(seed, M, N, K, gelu, threads):
    """2^-8 is half a bfloat16's last place, the rest is for sums in float32."""
    x, weight, b = bfloat16_case(seed, M, N, K)
    expected = F.linear(x.double(), weight.double(), b.double())
    if gelu:
        expected = F.gelu(expected, approximate="tanh")
    out = native(x, pack(weight), b, N, gelu, threads)
    assert torch.all((out - expected).abs() <= 2**-8 * expected.abs() + 3e-5)


@needs_amx
@pytest.mark.parametrize("N, K", [(4096, 1024), (1024, 4096)])
def test_the_transformers_layers_lose_little(N, K):
    """More than the result's rounding only by that of float32 sums: 1.7e-3 is that of the result."""
    x, weight, b = bfloat16_case(5, 20, N, K)
    expected = F.linear(x.double(), weight.double(), b.double())
    assert relative_error(native(x, pack(weight), b, N, threads=2), expected) < 1.8e-3


@needs_amx
def test_gelu_over_the_whole_range():
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([-3e38, -1e20, -0.0, 1e-30, 1e20, 3e38])])
    x = x.bfloat16()[:, None]
    one = pack(torch.ones(1, 1, dtype=torch.bfloat16))
    expected = F.gelu(x.double(), approximate="tanh")
    assert torch.all((native(x, one, None, 1, gelu=True) - expected).abs() <= 2**-8 * expected.abs() + 1e-7)
    special = torch.tensor([[float("nan")], [float("inf")], [-float("inf")]]).bfloat16()
    out = native(special, one, None, 1, gelu=True)
    assert out[0].isnan() and out[1] == float("inf") and abs(out[2]) < 1e-30


@needs_amx
@pytest.mark.parametrize("N, K", [(70, 515), (32, 1024), (40, 2500), (1, 3)])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_row_does_not_depend_on_the_others_nor_on_the_threads(N, K, gelu):
    """Bitwise; 600 rows take every path: blocks of rows, spans of chunks, groups of one tile."""
    x, weight, b = bfloat16_case(1, 600, N, K)
    packed = pack(weight)
    whole = native(x, packed, b, N, gelu)
    for threads in (1, 2, 3, 8):
        for m in (*range(1, 36), 72, 128, 255, 256, 257, 600):
            assert torch.equal(native(x[:m], packed, b, N, gelu, threads), whole[:m]), (m, threads)
    assert torch.equal(native(x[300:317].contiguous(), packed, b, N, gelu, 2), whole[300:317])


@needs_amx
def test_a_column_does_not_depend_on_the_others():
    x, weight, b = bfloat16_case(2, 9, 100, 300)
    whole = native(x, pack(weight), b, 100)
    for n in (1, 5, 31, 32, 33, 64, 99):
        assert torch.equal(native(x, pack(weight[:n]), b[:n], n), whole[:, :n])


@needs_amx
def test_without_rows_nothing_happens():
    x, weight, b = bfloat16_case(3, 0, 5, 7)
    assert native(x, pack(weight), b, 5).shape == (0, 5)


@needs_amx
def test_without_inputs_it_is_the_bias():
    x, weight, b = bfloat16_case(4, 3, 5, 0)
    assert torch.equal(native(x, pack(weight), b, 5), b.bfloat16().expand(3, 5))


@needs_amx
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), *SHAPES[:3], st.integers(1, 5))
@example(0, 1, 1, 1, 1)
@example(0, 300, 40, 100, 2)  # more than a block of rows
@example(0, 300, 70, 2100, 2)  # hidden features in several spans of chunks
@example(0, 600, 33, 40, 8)
def test_feed_forward_is_two_layers(seed, M, C, hidden, threads):
    """Bitwise, whatever the scratch memory held."""
    x, weight1, bias1 = bfloat16_case(seed, M, hidden, C)
    _, weight2, bias2 = bfloat16_case(seed + 1, 1, C, hidden)
    packed1, packed2 = pack(weight1), pack(weight2)
    expected = native(native(x, packed1, bias1, hidden, gelu=True), packed2, bias2, C)
    elements = _C.cpu_feed_forward_bf16_bytes(M, hidden) // 2
    scratch = torch.full((elements + 64,), float("nan"), dtype=torch.bfloat16)
    scratch[elements:] = GUARD
    y = torch.full((M * C + 64,), GUARD, dtype=torch.bfloat16)
    layers = (packed1.data_ptr(), bias1.data_ptr(), packed2.data_ptr(), bias2.data_ptr())
    _C.cpu_feed_forward_bf16(x.data_ptr(), *layers, M, C, hidden, scratch.data_ptr(), y.data_ptr(), threads)
    assert torch.all(y[M * C :] == GUARD) and torch.all(scratch[elements:] == GUARD)
    assert torch.equal(y[: M * C].reshape(M, C), expected)


def test_scratch_grows_with_the_rows():
    sizes = [_C.cpu_feed_forward_bf16_bytes(M, 100) for M in range(1, 200)]
    assert sizes == sorted(sizes)


CALL = "import torch; from var_fast import _C; _C.cpu_linear_bf16(0, 0, 0, 1, 1, 1, False, 0, 1)"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="VAR_FAST_ISA is for x86-64")
def test_older_instruction_sets_are_told():
    done = start_on("portable", "-c", CALL)
    assert done.returncode != 0 and "needs AMX" in done.stderr
