"""scale_cross_entropy: head and cross-entropy of the transformer, with loss and accuracy per scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend


def scale_cross_entropy_reference(
    h_BLC, weight_VC, bias_V, target_BL, token_weight_BL=None, label_smoothing=0.0, patch_nums=None
):
    logits_BLV = F.linear(h_BLC, weight_VC, bias_V)
    B, L, V = logits_BLV.shape
    if token_weight_BL is None:
        token_weight_BL = logits_BLV.new_full((B, L), 1 / L)
    ce_BL = F.cross_entropy(
        logits_BLV.reshape(-1, V), target_BL.reshape(-1), label_smoothing=label_smoothing, reduction="none"
    ).view(B, L)
    loss = (ce_BL * token_weight_BL).sum(1).mean()
    hit_BL = (logits_BLV.detach().argmax(-1) == target_BL).to(ce_BL.dtype)
    lengths = [L] if patch_nums is None else _lengths_of_prefix(patch_nums, L)
    loss_S = torch.stack([part.mean() for part in ce_BL.detach().split(lengths, dim=1)])
    accuracy_S = torch.stack([part.mean() for part in hit_BL.split(lengths, dim=1)])
    return loss, loss_S, accuracy_S


def scale_cross_entropy(
    h_BLC: torch.Tensor,
    weight_VC: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_BL: torch.Tensor,
    token_weight_BL: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    patch_nums: Sequence[int] | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of the codes predicted from h by the head (weight, bias), and its parts by scale.

    loss = mean over B of the sum over L of token weight times cross-entropy; weights default to 1 / L.
    Shapes: h (B, L, C), weight (V, C), bias (V,), target (B, L) int64, token_weight (B, L). Result: loss (), and per
    scale of `patch_nums` (or of a prefix of them; None: one scale) mean loss (S,) and accuracy (S,), both without
    gradient. Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run.
    """
    if target_BL.shape != h_BLC.shape[:2]:
        raise ValueError(f"target_BL has shape {tuple(target_BL.shape)}, expected (B, L) = {tuple(h_BLC.shape[:2])}")
    choose_backend("scale_cross_entropy", h_BLC.device, backend)
    return scale_cross_entropy_reference(
        h_BLC, weight_VC, bias_V, target_BL, token_weight_BL, label_smoothing, patch_nums
    )


def _lengths_of_prefix(patch_nums, L):
    lengths = []
    for pn in patch_nums:
        if sum(lengths) == L:
            break
        lengths.append(pn * pn)
    if sum(lengths) != L:
        raise ValueError(f"h_BLC has L = {L} tokens, expected a prefix of the scales {tuple(patch_nums)}")
    return lengths
