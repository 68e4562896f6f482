"""The native float32 linear layer: against float64, bitwise the same in any batch, on any threads, and of half weights
as of the same numbers in float32."""

import platform

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ops.on_isa import ISAS, rerun_on
from var_fast import _C

GUARD = 12345.0
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def native(x, weight, bias, gelu=False, threads=1):
    """linear(x (M, K), weight (N, K), bias (N) or None) -> (M, N); nothing but those M x N floats may be written."""
    M, N = len(x), len(weight)
    y = torch.full((M * N + 64,), GUARD)
    _C.cpu_linear(
        x.data_ptr(),
        weight.data_ptr(),
        TYPES[weight.dtype],
        0 if bias is None else bias.data_ptr(),
        M,
        N,
        x.shape[1],
        gelu,
        y.data_ptr(),
        threads,
    )
    assert torch.all(y[M * N :] == GUARD)
    return y[: M * N].reshape(M, N)


def random_case(seed, M, N, K, bias=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = (M, K), (N, K), (N,)
    x, weight, b = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, b if bias else None


def relative_error(out, reference):
    return ((out.double() - reference).norm() / reference.norm()).item()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 70),
    st.integers(1, 100),
    st.integers(1, 600),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
)
@example(0, 3, 5, 33, True, False, 2)
@example(0, 1, 1, 1, False, False, 1)
@example(0, 14, 32, 256, True, True, 1)
@example(0, 15, 64, 257, True, True, 2)
@example(0, 530, 33, 40, True, False, 2)  # more than a block of rows
@example(0, 300, 40, 1100, True, False, 2)  # x in several spans of chunks
def test_linear_matches_float64(seed, M, N, K, bias, gelu, threads):
    x, weight, b = random_case(seed, M, N, K, bias)
    reference = F.linear(x.double(), weight.double(), None if b is None else b.double())
    if gelu:
        reference = F.gelu(reference, approximate="tanh")
    out = native(x, weight, b, gelu, threads)
    # a few elements may all be near zero by chance: then the size that they have on average is what counts
    assert (out - reference).norm() <= 2e-6 * max(reference.norm(), (M * N * K) ** 0.5)


@pytest.mark.parametrize("N, K", [(4096, 1024), (1024, 4096)])
def test_the_transformers_layers_lose_little(N, K):
    x, weight, b = random_case(5, 20, N, K)
    assert relative_error(native(x, weight, b, threads=2), F.linear(x.double(), weight.double(), b.double())) < 1e-6


def test_gelu_over_the_whole_range():
    x = torch.cat([torch.linspace(-200, 200, 40001), torch.tensor([-3e38, -1e20, -0.0, 1e-30, 1e20, 3e38])])[:, None]
    out = native(x, torch.ones(1, 1), None, gelu=True)
    reference = F.gelu(x.double(), approximate="tanh")
    assert torch.all((out - reference).abs() <= 1e-6 * (0.1 + reference.abs()))
    special = native(torch.tensor([[float("nan")], [float("inf")], [-float("inf")]]), torch.ones(1, 1), None, gelu=True)
    assert special[0].isnan() and special[1] == float("inf") and abs(special[2]) < 1e-30


@pytest.mark.parametrize("N, K", [(70, 515), (32, 1024), (1, 3)])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_row_does_not_depend_on_the_others_nor_on_the_threads(N, K, gelu):
    """Bitwise; 1030 rows take every path: blocks of rows, spans of chunks, tiles of all heights."""
    x, weight, b = random_case(1, 1030, N, K)
    whole = native(x, weight, b, gelu)
    for threads in (1, 2, 3):
        for m in (*range(1, 45), 72, 128, 511, 512, 513, 1030):
            assert torch.equal(native(x[:m], weight, b, gelu, threads), whole[:m]), (m, threads)
    assert torch.equal(native(x[500:517].contiguous(), weight, b, gelu, 2), whole[500:517])


def test_a_column_does_not_depend_on_the_others():
    x, weight, b = random_case(2, 9, 100, 300)
    whole = native(x, weight, b)
    for n in (1, 5, 31, 32, 33, 64, 99):
        assert torch.equal(native(x, weight[:n], b[:n]), whole[:, :n])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.integers(1, 100),
    st.integers(0, 600),
    st.integers(1, 3),
)
@example(torch.bfloat16, 0, 1, 64, 512, 1)
@example(torch.float16, 0, 9, 64, 512, 2)
def test_half_weights_count_as_they_are(dtype, seed, M, N, K, threads):
    x, weight, b = random_case(seed, M, N, K)
    weight = weight.to(dtype)
    assert torch.equal(native(x, weight, b, True, threads), native(x, weight.float(), b, True, threads))


@pytest.mark.parametrize("K", [1, 16])  # one after the other, and many at once
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_number(dtype, K):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    weight = torch.zeros(len(numbers), K, dtype=dtype)
    weight[:, -1] = numbers
    y_1N = native(torch.ones(1, K), weight, None)
    assert torch.equal(y_1N[0], numbers.float())
    weight = torch.zeros(48, K, dtype=dtype)  # 32 columns of y at once, and a rest
    special = torch.tensor([float("inf"), -float("inf"), float("nan")], dtype=dtype).repeat(16)
    weight[:, -1] = special
    y_1N = native(torch.ones(1, K), weight, None)
    assert torch.equal(y_1N[0].nan_to_num(nan=7.0, posinf=8.0, neginf=9.0), torch.tensor([8.0, 9.0, 7.0]).repeat(16))


def test_without_rows_nothing_happens():
    x, weight, b = random_case(3, 0, 5, 7)
    assert native(x, weight, b).shape == (0, 5)


def test_without_inputs_it_is_the_bias():
    x, weight, b = random_case(4, 3, 5, 0)
    assert torch.equal(native(x, weight, b), b.expand(3, 5))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only")
@pytest.mark.parametrize("isa", ISAS[:3])  # the others have none of their own for float32
def test_every_instruction_set(isa):
    rerun_on(isa, __file__)
