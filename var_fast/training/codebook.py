"""Keeping the tokenizer's codebook alive.

A code that is never the nearest gets no gradient and stays unused for ever. So codes unused over a window of steps
are put where they are needed: on residual vectors of the current batch, which are what the quantizer searches for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.models import VQVAE


def code_rows_used(codebook_grad_VC: torch.Tensor) -> torch.Tensor:
    """(V,) bool: which codes a step used. Exactly the chosen rows of the codebook have a gradient."""
    return codebook_grad_VC.abs().amax(1) > 0


@torch.no_grad()
def residual_vectors(vae: VQVAE, img_B3HW: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per scale: the vectors the quantizer looks codes up for, (N, Cvae), and their squared distances to them, (N,)."""
    quantize = vae.quantize
    codebook_VC = quantize.embedding.weight
    rest_BChw = vae.quant_conv(vae.encoder(img_B3HW)).float()
    B, C, h, w = rest_BChw.shape
    scales = len(quantize.v_patch_nums)
    found = []
    for k, pn in enumerate(quantize.v_patch_nums):
        last = k == scales - 1
        z_BCpp = rest_BChw if last else F.interpolate(rest_BChw, size=(pn, pn), mode="area")
        z_NC = z_BCpp.permute(0, 2, 3, 1).reshape(-1, C)
        d_NV = torch.addmm(codebook_VC.square().sum(1), z_NC, codebook_VC.T, alpha=-2.0)
        nearest_N, idx_N = d_NV.min(1)
        found.append((z_NC, (nearest_N + z_NC.square().sum(1)).clamp_(min=0.0)))
        h_BCpp = codebook_VC[idx_N].view(B, pn, pn, C).permute(0, 3, 1, 2)
        h_BChw = h_BCpp if last else F.interpolate(h_BCpp, size=(h, w), mode="bicubic")
        rest_BChw = rest_BChw - quantize.quant_resi[k / max(1, scales - 1)](h_BChw.contiguous())
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
    fresh_NC = draw_candidates(residual_vectors(vae, img_B3HW), rows.numel())
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
