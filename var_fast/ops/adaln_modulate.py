"""adaln_modulate: layer norm whose scale and shift come from the condition (adaptive layer norm; VAR section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend


def adaln_modulate_reference(x_BLC, scale_BC, shift_BC, eps=1e-6):
    normed_BLC = F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=eps)
    return normed_BLC * (1 + scale_BC.unsqueeze(1)) + shift_BC.unsqueeze(1)


def residual_adaln_modulate_reference(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps=1e-6):
    x_BLC = x_BLC + branch_BLC * gate_BC.unsqueeze(1)
    return x_BLC, adaln_modulate_reference(x_BLC, scale_BC, shift_BC, eps)


def adaln_modulate(
    x_BLC: torch.Tensor,
    scale_BC: torch.Tensor,
    shift_BC: torch.Tensor,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """y = LN(x) (1 + scale) + shift, scale and shift per image; LN has no parameters of its own.

    Shapes: x (B, L, C); scale, shift (B, C); result (B, L, C).
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run.
    """
    _check_modulation(x_BLC, scale_BC=scale_BC, shift_BC=shift_BC)
    choose_backend("adaln_modulate", x_BLC.device, backend)
    return adaln_modulate_reference(x_BLC, scale_BC, shift_BC, eps)


def residual_adaln_modulate(
    x_BLC: torch.Tensor,
    branch_BLC: torch.Tensor,
    gate_BC: torch.Tensor,
    scale_BC: torch.Tensor,
    shift_BC: torch.Tensor,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual before the norm and the norm itself: x' = x + gate * branch, y = LN(x') (1 + scale) + shift.

    Shapes: x, branch (B, L, C); gate, scale, shift (B, C); result (x', y), both (B, L, C).
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run.
    """
    if branch_BLC.shape != x_BLC.shape:
        raise ValueError(f"branch_BLC has shape {tuple(branch_BLC.shape)}, expected x_BLC's, {tuple(x_BLC.shape)}")
    _check_modulation(x_BLC, gate_BC=gate_BC, scale_BC=scale_BC, shift_BC=shift_BC)
    choose_backend("residual_adaln_modulate", x_BLC.device, backend)
    return residual_adaln_modulate_reference(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps)


def _check_modulation(x_BLC, **per_image):
    if x_BLC.dim() != 3:
        raise ValueError(f"x_BLC has shape {tuple(x_BLC.shape)}, expected (B, L, C)")
    expected = (x_BLC.shape[0], x_BLC.shape[2])
    for name, tensor in per_image.items():
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (B, C) = {expected}")
