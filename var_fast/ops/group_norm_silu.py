"""group_norm_silu: the norm and activation before every convolution of the tokenizer's encoder and decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend


def group_norm_silu_reference(x_BChw, weight_C, bias_C, groups=32, eps=1e-6):
    return F.silu(F.group_norm(x_BChw, groups, weight_C, bias_C, eps), inplace=True)


def group_norm_silu(
    x_BChw: torch.Tensor,
    weight_C: torch.Tensor,
    bias_C: torch.Tensor,
    groups: int = 32,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """SiLU(GroupNorm(x) weight + bias).

    Shapes: x (B, C, h, w), weight and bias (C,), result (B, C, h, w); C a multiple of `groups`.
    Raises ValueError where they do not fit, BackendUnavailable where a named backend cannot run.
    """
    if x_BChw.shape[1] % groups:
        raise ValueError(f"x_BChw has {x_BChw.shape[1]} channels, expected a multiple of groups = {groups}")
    choose_backend("group_norm_silu", x_BChw.device, backend)
    return group_norm_silu_reference(x_BChw, weight_C, bias_C, groups, eps)
