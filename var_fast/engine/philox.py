"""Philox4x32-10: random numbers by counter and key, without state (Salmon et al., Parallel random numbers: as easy as
1, 2, 3, SC 2011)."""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def philox4x32(counter_N4: torch.Tensor, key_N2: torch.Tensor) -> torch.Tensor:
    """Four random 32-bit words for each counter of four words under a key of two: (N, 4), (N, 2) -> (N, 4), int64 in
    [0, 2^32)."""
    c0, c1, c2, c3 = counter_N4.unbind(-1)
    k0, k1 = key_N2.unbind(-1)
    for _ in range(10):
        # The product's upper bits overflow int64, but wrap to the right bits.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32) & _LOW32 ^ c1 ^ k0,
            product1 & _LOW32,
            (product0 >> 32) & _LOW32 ^ c3 ^ k1,
            product0 & _LOW32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniforms(seeds_B: torch.Tensor, stream: int, scale: int, tokens: int, per_token: int = 1) -> torch.Tensor:
    """Uniform numbers in [0, 1), (B, tokens, per_token) float32, a function of (seed, stream, scale, token, place)
    only.

    Seeds are int64; `stream` keeps numbers of different use apart. 24 bits each: every value is exact in float32.
    """
    device, B, blocks = seeds_B.device, seeds_B.shape[0], -(-per_token // 4)
    counter_BlN4 = torch.empty(B, tokens, blocks, 4, dtype=torch.int64, device=device)
    counter_BlN4[..., 0] = torch.arange(blocks, device=device)
    counter_BlN4[..., 1] = torch.arange(tokens, device=device).unsqueeze(-1)
    counter_BlN4[..., 2] = scale
    counter_BlN4[..., 3] = stream
    key_B2 = torch.stack((seeds_B & _LOW32, (seeds_B >> 32) & _LOW32), dim=-1)
    words_BlN4 = philox4x32(counter_BlN4, key_B2[:, None, None].expand(B, tokens, blocks, 2))
    return ((words_BlN4 >> 8).float() * 2**-24).flatten(2)[..., :per_token]
