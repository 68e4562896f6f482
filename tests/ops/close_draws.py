"""Draws of sample_tokens that come down to rounding, and draws that come down to almost that."""

from __future__ import annotations

import torch

from var_fast.ops.philox import TOKEN_STREAM, exponentials
from var_fast.ops.sample_tokens import filter_logits_


def near_ties(cond, uncond, guidance, top_k, top_p, seed_B, scale):
    """(B, l) bool: rows where a cumulative probability lies within 1e-12 of 1 - top_p, or a race is that close."""
    guided = cond.to(torch.float64, copy=True)  # filtered in place below, and cond may be float64 itself
    if uncond is not None:
        guided = (1 + guidance) * guided - guidance * uncond.double()
    filter_logits_(guided, top_k, 0.0)
    ascending = guided.sort(dim=-1).values.softmax(dim=-1).cumsum(dim=-1)
    at_p = ((ascending - (1 - top_p)).abs() < 1e-12).any(dim=-1) & (0 < top_p < 1)
    if cond.shape[-1] == 1:
        return at_p
    results = filter_logits_(guided, 0, top_p).softmax(dim=-1)
    results /= exponentials(seed_B, TOKEN_STREAM, scale, *cond.shape[1:])
    first, second = results.topk(2, dim=-1).values.unbind(-1)
    return at_p | (second > (1 - 1e-12) * first)


def photo_finishes(seed: int, scale: int, l: int, margin: float) -> torch.Tensor:
    """Logits (1, l, 3) of which code 0 leads code 1 by `margin` in the race (the logarithm of their results), code 2
    being far behind. A float32 near 0 is fine enough to make up for what the other one lacks."""
    e_l3 = exponentials(torch.tensor([seed]), TOKEN_STREAM, scale, l, 3)[0]
    lead = (e_l3[:, 1] / e_l3[:, 0]).log()
    logits = torch.full((1, l, 3), -60.0)
    logits[0, :, 1] = lead.float()
    logits[0, :, 0] = (logits[0, :, 1].double() - lead + margin).float()
    return logits
