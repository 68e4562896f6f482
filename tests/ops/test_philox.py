"""Philox4x32-10 against its published test vectors; exponentials by seed, stream, scale and token."""

from __future__ import annotations

import pytest
import torch

from var_fast.ops.philox import TOKEN_STREAM, exponentials, philox4x32

VECTORS = [  # counter, key, result: the known answers published with the Random123 library
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return torch.tensor([[int(word, 16) for word in text.split()]])


@pytest.mark.parametrize("counter,key,result", VECTORS)
def test_known_answers(counter, key, result):
    assert torch.equal(philox4x32(words(counter), words(key)), words(result))


@pytest.mark.parametrize("counter,key,result", VECTORS)
def test_known_answers_in_cpp(counter, key, result):
    native = pytest.importorskip("var_fast._C")
    assert list(native.philox4x32(words(counter)[0].tolist(), words(key)[0].tolist())) == words(result)[0].tolist()


@pytest.mark.parametrize("V", [1, 3, 64, 4099])
def test_the_random_numbers_of_tokens_in_cpp(V):
    native = pytest.importorskip("var_fast._C")
    seeds = torch.tensor([0, 5, 2**40 + 7, -3, 2**63 - 1, -(2**63)])
    for scale in (0, 1, 9):
        e_BlV = exponentials(seeds, TOKEN_STREAM, scale, 3, V)
        for seed, e_lV in zip(seeds.tolist(), e_BlV, strict=True):
            own_lV = [native.cpu_token_exponentials(seed, scale, token, V) for token in range(3)]
            torch.testing.assert_close(torch.tensor(own_lV, dtype=torch.float64), e_lV, rtol=1e-15, atol=0)


def test_exponentials_are_those_of_the_words():
    """One block written out: counter (block, token, scale, stream), key the seed's low and high word."""
    seed, stream, scale, token, block = 2**40 + 7, 1, 4, 6, 2
    words_4 = philox4x32(torch.tensor([[block, token, scale, stream]]), torch.tensor([[7, 2**8]]))[0]
    found = exponentials(torch.tensor([seed]), stream, scale, 7, 12)[0, token, 8:]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, -((words_4.double() + 0.5) / 2**32).log(), rtol=1e-15, atol=0)


def test_exponentials_depend_on_seed_stream_scale_token_and_place_only():
    seeds = torch.tensor([5, 2**40 + 7, -3])
    e = exponentials(seeds, stream=0, scale=2, tokens=9, per_token=6)
    assert e.shape == (3, 9, 6) and e.min() > 0
    assert torch.equal(e[1:2], exponentials(seeds[1:2], stream=0, scale=2, tokens=9, per_token=6))
    assert torch.equal(e[:, :4, :1], exponentials(seeds, stream=0, scale=2, tokens=4, per_token=1))
    others = [exponentials(seeds, 1, 2, 9, 6), exponentials(seeds, 0, 3, 9, 6), exponentials(seeds + 1, 0, 2, 9, 6)]
    assert not any((e == other).any() for other in others)
    assert not (e[0] == e[1]).any()


def test_exponentials_are_exponential():
    u = exponentials(torch.arange(64), stream=0, scale=0, tokens=64, per_token=4).neg().exp().flatten()
    counts = torch.histc(u, bins=16, min=0, max=1)
    expected = u.numel() / 16
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 15 degrees of freedom, p about 1e-4
