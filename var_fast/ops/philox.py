"""Philox4x32-10: random numbers by counter and key, without state (Salmon et al., Parallel random numbers: as easy as
1, 2, 3, SC 2011)."""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF

TOKEN_STREAM, GUMBEL_STREAM = 0, 1  # the draws of sample_tokens, those of mixed_codes


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


def exponentials(seed_B: torch.Tensor, stream: int, scale: int, tokens: int, per_token: int) -> torch.Tensor:
    """Exponential random numbers of mean 1, (B, tokens, per_token) float64, a function of (seed, stream, scale, token,
    place) only: -log((word + 1/2) / 2^32), from 1.2e-10 to 22.9.

    Seeds are int64; `stream` keeps numbers of different use apart.
    """
    if len(seed_B) > 8:  # a part at a time: the counters take several times the memory of what comes of them
        parts = [exponentials(part, stream, scale, tokens, per_token) for part in seed_B.split(8)]
        return torch.cat(parts)
    device, B, blocks = seed_B.device, seed_B.shape[0], -(-per_token // 4)
    counter_BlN4 = torch.empty(B, tokens, blocks, 4, dtype=torch.int64, device=device)
    counter_BlN4[..., 0] = torch.arange(blocks, device=device)
    counter_BlN4[..., 1] = torch.arange(tokens, device=device).unsqueeze(-1)
    counter_BlN4[..., 2] = scale
    counter_BlN4[..., 3] = stream
    key_B2 = torch.stack((seed_B & _LOW32, (seed_B >> 32) & _LOW32), dim=-1)
    words_BlN4 = philox4x32(counter_BlN4, key_B2[:, None, None].expand(B, tokens, blocks, 2))
    return words_BlN4.flatten(2)[..., :per_token].double().add_(0.5).mul_(2**-32).log_().neg_()
