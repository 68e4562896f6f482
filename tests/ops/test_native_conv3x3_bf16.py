"""The native bfloat16 3x3 convolution: exact where rounding is, near float64 elsewhere, the same in any batch."""

import platform

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ops.on_isa import start_on
from tests.ops.test_native_conv3x3 import random_case, reference, relative_error
from var_fast import _C

GUARD = 12352.0  # exact in bfloat16
HERE = _C.cpu_isa() in ("avx512_bf16", "amx")
needs_bfloat16 = pytest.mark.skipif(not HERE, reason=f"{_C.cpu_isa()} has no bfloat16 products")


def pack(weight):
    """weight (Cout, Cin, 3, 3) float32 -> what conv3x3_bf16 reads."""
    Cout, Cin = weight.shape[:2]
    elements = _C.cpu_conv3x3_bf16_packed_bytes(Cin, Cout) // 2
    packed = torch.full((elements + 64,), GUARD, dtype=torch.bfloat16)
    _C.cpu_conv3x3_bf16_pack(weight.data_ptr(), Cin, Cout, packed.data_ptr())
    assert torch.all(packed[elements:] == GUARD)
    return packed


def native(x, packed, bias, residual, Cout, threads=1, in_place=False):
    """conv3x3_bf16(x (B, h, w, Cin)) -> (B, h, w, Cout); nothing but those elements may be written."""
    B, h, w, Cin = x.shape
    n = B * h * w * Cout
    y = torch.full((n + 64,), GUARD, dtype=torch.bfloat16)
    if in_place:
        y[:n] = residual.flatten()
    residual_address = 0 if residual is None else y.data_ptr() if in_place else residual.data_ptr()
    bias_address = 0 if bias is None else bias.data_ptr()
    _C.cpu_conv3x3_bf16(
        x.data_ptr(), packed.data_ptr(), bias_address, residual_address, B, h, w, Cin, Cout, y.data_ptr(), threads
    )
    assert torch.all(y[n:] == GUARD)
    return y[:n].reshape(B, h, w, Cout)


def bfloat16_case(seed, B, h, w, Cin, Cout):
    """x and residual in bfloat16, weight and bias in float32"""
    x, weight, bias, residual = random_case(seed, B, h, w, Cin, Cout)
    return x.bfloat16(), weight, bias, residual.bfloat16()


@needs_bfloat16
@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 14),
    st.integers(1, 14),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
)
@example(0, 1, 1, 1, 1, 1, False, False, 1)
@example(0, 1, 40, 36, 32, 64, True, True, 2)  # whole groups and panels
@example(0, 1, 8, 8, 330, 100, True, True, 2)
def test_exact_where_nothing_is_rounded(seed, B, h, w, Cin, Cout, with_bias, with_residual, threads):
    """x of -1, 0, 1 and weights of four times that: transforms, products and sums are whole numbers, and so are
    results, which bfloat16 holds up to 256: of the weights so many are zero that they stay below."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (B, h, w, Cin), generator=g)
    weight = 4 * torch.randint(-1, 2, (Cout, Cin, 3, 3), generator=g)
    weight *= torch.rand(weight.shape, generator=g) < 20 / (9 * Cin)  # about 13 of them are not zero
    bias, residual = torch.randint(-9, 10, (Cout,), generator=g), torch.randint(-9, 10, (B, h, w, Cout), generator=g)
    bias, residual = bias if with_bias else None, residual if with_residual else None
    expected = reference(x, weight, bias, residual)
    out = native(
        x.bfloat16(),
        pack(weight.float()),
        None if bias is None else bias.float(),
        None if residual is None else residual.bfloat16(),
        Cout,
        threads,
    )
    assert torch.equal(out, expected.bfloat16())


@needs_bfloat16
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 14), st.integers(1, 14), st.integers(1, 70), st.integers(1, 70))
def test_matches_float64(seed, h, w, Cin, Cout):
    x, weight, bias, residual = bfloat16_case(seed, 2, h, w, Cin, Cout)
    out, expected = native(x, pack(weight), bias, residual, Cout, 2), reference(x, weight, bias, residual)
    assert (out - expected).norm() < 1e-2 * max(expected.norm(), (9 * Cin * out.numel()) ** 0.5)


@needs_bfloat16
@pytest.mark.parametrize("C, side", [(160, 32), (320, 16), (640, 16)])
def test_the_decoders_layers_lose_little(C, side):
    """4.1e-3 comes of what is rounded on the way, 1.7e-3 of the result's own rounding."""
    x, weight, bias, _ = random_case(1, 1, side, side, C, C)
    x = F.silu(x).bfloat16()
    assert relative_error(native(x, pack(weight), bias, None, C, 2), reference(x, weight, bias, None)) < 5e-3


@needs_bfloat16
@pytest.mark.parametrize("h, w, Cin, Cout", [(8, 8, 20, 100), (17, 21, 33, 40), (32, 32, 32, 32), (4, 4, 640, 64)])
def test_an_image_does_not_depend_on_the_others_nor_on_the_threads(h, w, Cin, Cout):
    x, weight, bias, residual = bfloat16_case(3, 7, h, w, Cin, Cout)
    packed = pack(weight)
    whole = native(x, packed, bias, residual, Cout)
    for threads in (1, 2, 3):
        assert torch.equal(native(x, packed, bias, residual, Cout, threads), whole)
        for image in (0, 3, 6):
            alone = native(x[image : image + 1], packed, bias, residual[image : image + 1], Cout, threads)
            assert torch.equal(alone, whole[image : image + 1])


@needs_bfloat16
def test_residual_may_be_the_output_itself():
    x, weight, bias, residual = bfloat16_case(4, 2, 9, 10, 40, 50)
    packed = pack(weight)
    expected = native(x, packed, bias, residual, 50)
    assert torch.equal(native(x, packed, bias, residual, 50, 2, in_place=True), expected)


@needs_bfloat16
def test_no_image_and_no_channel():
    weight = torch.randn(8, 4, 3, 3)
    assert native(torch.zeros(0, 4, 4, 4, dtype=torch.bfloat16), pack(weight), None, None, 8).shape == (0, 4, 4, 8)
    empty = torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16)
    assert native(empty, pack(weight[:0]), None, None, 0).shape == (1, 4, 4, 0)
    assert not native(empty[..., :0], pack(weight[:, :0]), None, None, 8).any()


CALL = "import torch; from var_fast import _C; _C.cpu_conv3x3_bf16(0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1)"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="VAR_FAST_ISA is for x86-64")
def test_older_instruction_sets_are_told():
    done = start_on("portable", "-c", CALL)
    assert done.returncode != 0 and "needs AVX-512's bfloat16 instructions" in done.stderr
