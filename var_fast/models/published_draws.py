"""The random draws of the published sampling code, in its order: same generator state, same image (`rng="torch"`)."""

from __future__ import annotations

import torch

from var_fast.ops import filter_logits_


def smoothing(si: int, num_scales: int) -> tuple[float, float]:
    """(sharpness, temperature) of `more_smooth` at scale `si`: logits times the first, Gumbel softmax at the second."""
    ratio = si / max(num_scales - 1, 1)
    return 1 + ratio, max(0.27 * (1 - ratio * 0.95), 0.005)


def sample_with_top_k_top_p_(
    logits_BlV: torch.Tensor,
    top_k: int = 0,
    top_p: float = 0.0,
    rng: torch.Generator | None = None,
    num_samples: int = 1,
) -> torch.Tensor:
    """One multinomial over all tokens of a scale: (B, l, V) -> (B, l, num_samples) int64.

    The logits are filtered in place. Negative `num_samples`: so many, without replacement.
    """
    B, length, V = logits_BlV.shape
    probs_NV = filter_logits_(logits_BlV, top_k, top_p).softmax(dim=-1).view(-1, V)
    idx_NS = torch.multinomial(probs_NV, abs(num_samples), replacement=num_samples >= 0, generator=rng)
    return idx_NS.view(B, length, abs(num_samples))


def gumbel_softmax_with_rng(
    logits: torch.Tensor,
    tau: float = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    rng: torch.Generator | None = None,
) -> torch.Tensor:
    """Gumbel softmax at temperature `tau` (Jang et al. 2017), of the shape of the logits; `hard`: one-hot, with the
    gradient of the soft one; `eps` has no effect, as in torch. The weights of codes in `more_smooth`."""
    gumbels = -torch.empty_like(logits).exponential_(generator=rng).log()
    soft = ((logits + gumbels) / tau).softmax(dim=dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim=dim, keepdim=True), 1.0)
    return one_hot - soft.detach() + soft
