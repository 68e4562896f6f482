"""What the operators share that run in the extension var_fast._C, which takes addresses and numbers."""

from __future__ import annotations

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as csrc/ops.h numbers them


def pointer(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def as_float32(x: torch.Tensor | None) -> torch.Tensor | None:
    """x itself where it is contiguous float32."""
    return None if x is None else x.to(torch.float32).contiguous()


def misfit(x: torch.Tensor, *others: torch.Tensor | None, differentiable: bool = False) -> str | None:
    """Why a native operator cannot take these tensors (its result is of x's type), or None if it can."""
    tensors = [x, *(other for other in others if other is not None)]
    if not differentiable and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no gradient, and an input requires one (call it under torch.no_grad())"
    if x.dtype not in TYPES:
        return f"it computes in float32 or bfloat16, and was given {x.dtype}"
    for other in tensors[1:]:
        if torch.promote_types(x.dtype, other.dtype) != x.dtype:
            return f"it was given {other.dtype} beside {x.dtype}"
        if other.device != x.device:
            return f"it was given tensors on {x.device} and {other.device}"
    return None
