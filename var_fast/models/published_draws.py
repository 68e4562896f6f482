"""The random draws of the published sampling code, in its order: same generator state, same image (`rng="torch"`)."""

from __future__ import annotations

import torch

from var_fast.ops import filter_logits_


def draw_tokens(logits_BlV: torch.Tensor, top_k: int, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """One multinomial over all tokens of a scale: (B, l, V) -> (B, l) int64. The logits are filtered in place."""
    B, length, V = logits_BlV.shape
    probs_NV = filter_logits_(logits_BlV, top_k, top_p).softmax(dim=-1).view(-1, V)
    return torch.multinomial(probs_NV, num_samples=1, generator=generator).view(B, length)


def gumbel_weights(logits_BlV: torch.Tensor, tau: float, generator: torch.Generator | None) -> torch.Tensor:
    """Gumbel softmax (B, l, V): the code weights of `more_smooth`."""
    gumbel_BlV = -torch.empty_like(logits_BlV).exponential_(generator=generator).log()
    return ((logits_BlV + gumbel_BlV) / tau).softmax(dim=-1)
