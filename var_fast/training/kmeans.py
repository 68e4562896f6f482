"""k-means: centres that lie close to many vectors (Lloyd 1982; the seeds of Arthur and Vassilvitskii 2007, many at a
time, as Bahmani et al. 2012)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops import codebook_search

SEED_ROUNDS = 64
CHUNK = 1 << 26
"""Distances from vectors to centres that are computed at a time: 256 MB."""


def nearest(z_NC: torch.Tensor, centre_VC: torch.Tensor, cosine: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of each vector's nearest centre (N,) and the squared distance to it (N,); with `cosine` both at unit
    length."""
    pieces = []
    for z in z_NC.split(max(1, CHUNK // len(centre_VC))):
        idx = codebook_search(z, centre_VC, cosine)
        pair = (z, centre_VC[idx])
        if cosine:
            pair = tuple(F.normalize(x, dim=-1) for x in pair)
        pieces.append((idx, (pair[0] - pair[1]).square().sum(1)))
    idx_N, distance_N = (torch.cat(part) for part in zip(*pieces, strict=True))
    return idx_N, distance_N


def kmeans(
    z_NC: torch.Tensor,
    weight_N: torch.Tensor,
    count: int,
    generator: torch.Generator,
    *,
    iterations: int = 10,
    cosine: bool = False,
) -> torch.Tensor:
    """(count, C) centres of the vectors (N, C), each of which counts `weight_N` times; random only by `generator`,
    which is on the vectors' device.

    Seeds are drawn in rounds, in proportion to weight times squared distance to the seeds before. A centre without
    vectors moves to one of the worst served ones. Where there are fewer vectors than centres, vectors are repeated.
    """
    distinct = min(count, len(z_NC))
    centre_VC = _seeds(z_NC, weight_N, distinct, generator, cosine)
    for _ in range(iterations):
        idx_N, distance_N = nearest(z_NC, centre_VC, cosine)
        mass_V = weight_N.new_zeros(distinct, dtype=torch.float64).index_add_(0, idx_N, weight_N.double())
        sum_VC = mass_V.new_zeros(centre_VC.shape).index_add_(0, idx_N, (z_NC * weight_N[:, None]).double())
        empty = (mass_V == 0).nonzero().flatten()
        centre_VC = torch.where(mass_V[:, None] > 0, sum_VC / mass_V[:, None], centre_VC.double()).to(z_NC.dtype)
        centre_VC[empty] = z_NC[(weight_N * distance_N).topk(len(empty)).indices]
    more = torch.randint(len(z_NC), (count - distinct,), generator=generator, device=z_NC.device)
    return torch.cat([centre_VC, z_NC[more]])


def _seeds(z_NC, weight_N, count, generator, cosine):
    share = -(-count // SEED_ROUNDS)
    chosen_M, distance_N = None, torch.ones_like(weight_N)
    while chosen_M is None or len(chosen_M) < count:
        here = min(share, count - (0 if chosen_M is None else len(chosen_M)))
        new = _draw(weight_N * distance_N, here, generator)
        distance_to_new_N = nearest(z_NC, z_NC[new], cosine)[1]
        if chosen_M is None:
            chosen_M, distance_N = new, distance_to_new_N
        else:
            chosen_M, distance_N = torch.cat([chosen_M, new]), torch.minimum(distance_N, distance_to_new_N)
    return z_NC[chosen_M].clone()


def _draw(weight_N: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` different indices, in proportion to weight, as torch.multinomial draws them, which takes fewer than 2^24
    weights."""
    wait_N = torch.empty_like(weight_N).exponential_(generator=generator)
    return (weight_N / wait_N).topk(count).indices
