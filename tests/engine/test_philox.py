"""Philox4x32-10 against its published test vectors; uniforms by seed, stream, scale and token."""

from __future__ import annotations

import pytest
import torch

from var_fast.engine.mixed_codes import TOKEN_STREAM
from var_fast.engine.philox import philox4x32, uniforms

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


def test_the_draws_of_tokens_in_cpp():
    native = pytest.importorskip("var_fast._C")
    seeds = torch.tensor([0, 5, 2**40 + 7, -3, 2**63 - 1, -(2**63)])
    for scale in (0, 1, 9):
        u = uniforms(seeds, TOKEN_STREAM, scale, 300)[..., 0]
        for i, seed in enumerate(seeds.tolist()):
            assert [native.token_uniform(seed, scale, token) for token in range(300)] == u[i].tolist()


def test_uniforms_depend_on_seed_stream_scale_and_token_only():
    seeds = torch.tensor([5, 2**40 + 7, -3])
    u = uniforms(seeds, stream=0, scale=2, tokens=9, per_token=6)
    assert u.shape == (3, 9, 6) and u.min() >= 0 and u.max() < 1
    assert torch.equal(u[1:2], uniforms(seeds[1:2], stream=0, scale=2, tokens=9, per_token=6))
    assert torch.equal(u[:, :4, :1], uniforms(seeds, stream=0, scale=2, tokens=4))
    others = [uniforms(seeds, 1, 2, 9, 6), uniforms(seeds, 0, 3, 9, 6), uniforms(seeds + 1, 0, 2, 9, 6)]
    assert not any((u == other).float().mean() > 0.01 for other in others)
    assert not (u[0] == u[1]).any()


def test_uniforms_are_uniform():
    u = uniforms(torch.arange(64), stream=0, scale=0, tokens=64, per_token=4).flatten()
    counts = torch.histc(u, bins=16, min=0, max=1)
    expected = u.numel() / 16
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 15 degrees of freedom, p about 1e-4
