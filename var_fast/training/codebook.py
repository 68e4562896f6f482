"""Keeping the tokenizer's codebook alive.

A code that is never the nearest gets no gradient and stays unused for ever. So codes unused over a window of steps
are put where they are needed: on residual vectors of the current batch, which are what the quantizer searches for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.models import VQVAE
from var_fast.ops import multiscale_quantize


def code_rows_used(codebook_grad_VC: torch.Tensor) -> torch.Tensor:
    """(V,) bool: which codes a step used. Exactly the chosen rows of the codebook have a gradient."""
    return codebook_grad_VC.abs().amax(1) > 0


@torch.no_grad()
def residual_vectors(vae: VQVAE, img_B3HW: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per scale: the vectors the quantizer looks codes up for, (N, Cvae), and their squared distances to these codes,
    (N,), taken at unit length with `using_znorm`, as the quantizer compares them.
    """
    quantize = vae.quantize
    codebook_VC = quantize.embedding.weight
    searched: list[torch.Tensor] = []
    idx_Bl_per_scale, _ = multiscale_quantize(
        vae.encode(img_B3HW).float(),
        codebook_VC,
        quantize.quant_resi.__getitem__,
        quantize.v_patch_nums,
        quantize.using_znorm,
        on_residual=searched.append,
    )
    found = []
    for z_NC, idx_Bl in zip(searched, idx_Bl_per_scale, strict=True):
        code_NC = codebook_VC[idx_Bl.flatten()]
        pair = (F.normalize(z_NC, dim=-1), F.normalize(code_NC, dim=-1)) if quantize.using_znorm else (z_NC, code_NC)
        found.append((z_NC, (pair[0] - pair[1]).square().sum(1)))
    return found


def draw_candidates(scales: list[tuple[torch.Tensor, torch.Tensor]], count: int) -> torch.Tensor:
    """Up to `count` vectors, (n, Cvae): badly served ones more likely (in proportion to their squared distance).

    Each scale gets a share in proportion to its side, not to its area: coarse scales have few vectors, but each
    of theirs covers a large part of the picture.
    """
    pieces = []
    for z_NC, distance_N in scales:
        side = z_NC.shape[0] ** 0.5
        total = sum(z.shape[0] ** 0.5 for z, _ in scales)
        share = min(z_NC.shape[0], -(-int(count * side) // int(total)) if total >= 1 else count)
        pieces.append(z_NC[torch.multinomial(distance_N + 1e-12, max(1, share))])
    pool = torch.cat(pieces)
    return pool[torch.randperm(pool.shape[0], device=pool.device)[:count]]


@torch.no_grad()
def revive_codes(
    vae: VQVAE,
    dead_V: torch.Tensor,
    img_B3HW: torch.Tensor,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    average: VQVAE | None = None,
) -> int:
    """Move the codes `dead_V` (V,) bool onto residual vectors of the batch; returns how many were moved.

    Their rows of the optimizer's state start afresh, and `average` (the EMA model) gets the same rows.
    """
    rows = dead_V.nonzero().flatten()
    if not rows.numel():
        return 0
    weight = vae.quantize.embedding.weight
    scales = residual_vectors(vae, img_B3HW)
    if not all(torch.isfinite(distance_N).all() for _, distance_N in scales):
        return 0  # the run is lost; the loop says so
    fresh_NC = draw_candidates(scales, rows.numel())
    rows = rows[torch.randperm(rows.numel(), device=rows.device)[: fresh_NC.shape[0]]]
    weight[rows] = fresh_NC.to(weight.dtype)
    if average is not None:
        average.quantize.embedding.weight[rows] = fresh_NC.to(weight.dtype)
    state = optimizer.state.get(weight) if optimizer is not None else None
    if state:
        live_V = torch.ones_like(dead_V)
        live_V[rows] = False
        second = state["exp_avg_sq"]
        state["exp_avg"][rows] = 0.0
        # The typical scale of live rows, not zero: with zero the first steps of a revived code would be huge.
        second[rows] = second[live_V].mean(0) if live_V.any() else 0.0
    return rows.numel()
