"""mixed_codes: `more_smooth`, one draw of a Gumbel softmax over all codes instead of one code (VAR's demo option)."""

from __future__ import annotations

import torch

from var_fast.models.published_draws import smoothing
from var_fast.ops import filter_logits_
from var_fast.ops.philox import GUMBEL_STREAM, exponentials


def mixed_codes(
    logits_BlV: torch.Tensor,
    seed_B: torch.Tensor,
    si: int,
    num_scales: int,
    top_k: int,
    top_p: float,
    codebook_VC: torch.Tensor,
) -> torch.Tensor:
    """(B, l, Cvae): the codes weighted by a Gumbel softmax of guided logits, at scale `si` of `num_scales`, with each
    image's own random numbers."""
    sharpness, tau = smoothing(si, num_scales)
    logits_BlV = filter_logits_(logits_BlV.clone(), top_k, top_p) * sharpness
    gumbel_BlV = exponentials(seed_B, GUMBEL_STREAM, si, *logits_BlV.shape[1:]).log_().neg_().float()
    return ((logits_BlV + gumbel_BlV) / tau).softmax(dim=-1) @ codebook_VC
