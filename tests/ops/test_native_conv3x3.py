"""The native float32 3x3 convolution: against float64, and bitwise the same in any batch and on any threads."""

import platform

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ops.on_isa import ISAS, rerun_on
from var_fast import _C

GUARD = 12345.0


def pack(weight, threads=2):
    """weight (Cout, Cin, 3, 3) -> what conv3x3 reads."""
    Cout, Cin = weight.shape[:2]
    floats = _C.cpu_conv3x3_packed_bytes(Cin, Cout) // 4
    packed = torch.full((floats + 64,), GUARD)
    _C.cpu_conv3x3_pack(weight.data_ptr(), Cin, Cout, packed.data_ptr(), threads)
    assert torch.all(packed[floats:] == GUARD)
    return packed


def native(x, packed, bias, residual, Cout, threads=1, in_place=False):
    """conv3x3(x (B, h, w, Cin)) -> (B, h, w, Cout); nothing but those floats may be written."""
    B, h, w, Cin = x.shape
    n = B * h * w * Cout
    y = torch.full((n + 64,), GUARD)
    if in_place:
        y[:n] = residual.flatten()
    residual_address = 0 if residual is None else y.data_ptr() if in_place else residual.data_ptr()
    bias_address = 0 if bias is None else bias.data_ptr()
    _C.cpu_conv3x3(
        x.data_ptr(),
        packed.data_ptr(),
        bias_address,
        residual_address,
        B,
        h,
        w,
        Cin,
        Cout,
        y.data_ptr(),
        threads,
    )
    assert torch.all(y[n:] == GUARD)
    return y[:n].reshape(B, h, w, Cout)


def random_case(seed, B, h, w, Cin, Cout):
    """x, weight, bias, residual"""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, h, w, Cin), (Cout, Cin, 3, 3), (Cout,), (B, h, w, Cout)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def reference(x, weight, bias, residual):
    bias = None if bias is None else bias.double()
    y = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), bias, padding=1).permute(0, 2, 3, 1)
    return y if residual is None else y + residual.double()


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


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
@example(0, 1, 40, 36, 32, 64, True, True, 2)  # tiles shared out
@example(0, 1, 8, 8, 330, 100, True, True, 2)  # three chunks of channels, panels shared out
def test_matches_float64(seed, B, h, w, Cin, Cout, with_bias, with_residual, threads):
    x, weight, bias, residual = random_case(seed, B, h, w, Cin, Cout)
    bias, residual = bias if with_bias else None, residual if with_residual else None
    out = native(x, pack(weight), bias, residual, Cout, threads)
    # a few elements may all be near zero by chance: then the size that they have on average is what counts
    expected = reference(x, weight, bias, residual)
    assert (out - expected).norm() < 5e-6 * max(expected.norm(), (9 * Cin * out.numel()) ** 0.5)


@pytest.mark.parametrize("C, side", [(160, 32), (320, 16), (640, 16)])
def test_the_decoders_layers_lose_little(C, side):
    x, weight, bias, _ = random_case(1, 1, side, side, C, C)
    x = F.silu(x)
    out = native(x, pack(weight), bias, None, C, 2)
    expected = reference(x, weight, bias, None)
    assert relative_error(out, expected) < 3e-6
    assert (out - expected).abs().max() < 4e-5 * expected.square().mean().sqrt()


def test_one_pixel_reaches_its_nine_neighbours_only():
    """An impulse at every place of an image that is no multiple of 4: zero wherever the kernel does not reach."""
    _, weight, _, _ = random_case(2, 1, 1, 1, 1, 1)
    packed = pack(weight)
    for i in range(6):
        for j in range(7):
            x = torch.zeros(1, 6, 7, 1)
            x[0, i, j] = 1
            out, expected = native(x, packed, None, None, 1), reference(x, weight, None, None)
            assert torch.allclose(out.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("h, w, Cin, Cout", [(8, 8, 20, 100), (17, 21, 33, 40), (32, 32, 16, 32)])
def test_an_image_does_not_depend_on_the_others_nor_on_the_threads(h, w, Cin, Cout):
    x, weight, bias, residual = random_case(3, 7, h, w, Cin, Cout)
    packed = pack(weight)
    whole = native(x, packed, bias, residual, Cout)
    for threads in (1, 2, 3):
        assert torch.equal(native(x, packed, bias, residual, Cout, threads), whole)
        for image in (0, 3, 6):
            alone = native(x[image : image + 1], packed, bias, residual[image : image + 1], Cout, threads)
            assert torch.equal(alone, whole[image : image + 1])


@pytest.mark.parametrize("Cin, Cout", [(32, 32), (330, 100)])  # in one part and in several
def test_packed_weights_do_not_depend_on_the_threads(Cin, Cout):
    weight = torch.randn(Cout, Cin, 3, 3)
    assert torch.equal(pack(weight, threads=1), pack(weight, threads=3))


def test_residual_may_be_the_output_itself():
    x, weight, bias, residual = random_case(4, 2, 9, 10, 40, 50)
    packed = pack(weight)
    expected = native(x, packed, bias, residual, 50)
    assert torch.equal(native(x, packed, bias, residual, 50, 2, in_place=True), expected)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only")
@pytest.mark.parametrize("isa", ISAS[:3])  # the others have none of their own for float32
def test_every_instruction_set(isa):
    rerun_on(isa, __file__)
