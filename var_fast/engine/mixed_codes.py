"""mixed_codes: `more_smooth`, one draw of a Gumbel softmax over all codes instead of one code (VAR's demo option)."""

from __future__ import annotations

import torch

from var_fast.engine.philox import uniforms
from var_fast.models.published_draws import smoothing
from var_fast.ops import filter_logits_

TOKEN_STREAM, GUMBEL_STREAM = 0, 1


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
    u_BlV = uniforms(seed_B, GUMBEL_STREAM, si, *logits_BlV.shape[1:])
    gumbel_BlV = -torch.log(-torch.log(u_BlV.clamp_min(2**-25)))
    return ((logits_BlV + gumbel_BlV) / tau).softmax(dim=-1) @ codebook_VC
