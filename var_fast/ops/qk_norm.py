"""qk_norm: split the packed projection and normalise queries and keys (attn_l2_norm; VAR section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend


def qk_norm_reference(qkv_BL3HD, scale_H):
    q_BLHD, k_BLHD, v_BLHD = qkv_BL3HD.unbind(2)
    if scale_H is None:
        return q_BLHD, k_BLHD, v_BLHD
    return F.normalize(q_BLHD, dim=-1) * scale_H.view(-1, 1), F.normalize(k_BLHD, dim=-1), v_BLHD


def qk_norm(
    qkv_BL3HD: torch.Tensor, scale_H: torch.Tensor | None, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, k, v) of a packed projection; q and k at unit length, q then times its head's scale.

    Shapes: qkv (B, L, 3, H, D); scale (H,), already exp(min(., log 100)), or None: split only; results (B, L, H, D).
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run.
    """
    if qkv_BL3HD.dim() != 5 or qkv_BL3HD.shape[2] != 3:
        raise ValueError(f"qkv_BL3HD has shape {tuple(qkv_BL3HD.shape)}, expected (B, L, 3, H, D)")
    if scale_H is not None and scale_H.shape != qkv_BL3HD.shape[3:4]:
        raise ValueError(f"scale_H has shape {tuple(scale_H.shape)}, expected (H,) = ({qkv_BL3HD.shape[3]},)")
    choose_backend("qk_norm", qkv_BL3HD.device, backend)
    return qk_norm_reference(qkv_BL3HD, scale_H)
