"""qk_norm: split the packed projection and normalise queries and keys (attn_l2_norm; VAR section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend
from var_fast.ops.library import register


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
    v is a view of qkv, and without scale q and k are too. Under autocast the reference gives q and k in float32; Triton
    computes in float32 and gives them in qkv's type.
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run.
    """
    if qkv_BL3HD.dim() != 5 or qkv_BL3HD.shape[2] != 3:
        raise ValueError(f"qkv_BL3HD has shape {tuple(qkv_BL3HD.shape)}, expected (B, L, 3, H, D)")
    if scale_H is not None and scale_H.shape != qkv_BL3HD.shape[3:4]:
        raise ValueError(f"scale_H has shape {tuple(scale_H.shape)}, expected (H,) = ({qkv_BL3HD.shape[3]},)")
    if choose_backend("qk_norm", qkv_BL3HD.device, backend) == "triton" and scale_H is not None:
        return _QKNorm.apply(qkv_BL3HD, scale_H)
    return qk_norm_reference(qkv_BL3HD, scale_H)


# ---------------------------------------------------------------------------------------------------- Triton, autograd
# v has to be both a view (an operator of torch.library may not return one) and an output whose gradient the backward
# kernel packs together with those of q and k. So autograd sees a Function around two operators. In bytes, N those of
# one of q, k, v, forward + backward:
#   this Function                                              4 N +  8 N = 12 N, the least possible
#   an operator that returns a copy of v                       6 N +  8 N = 14 N, and N more memory kept
#   an operator on unbound q and k, their gradients stacked    4 N + 12 N = 16 N
#   an operator on qkv, v sliced outside (zeros, then a sum)   4 N + 21 N = 25 N
class _QKNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_BL3HD, scale_H):
        ctx.save_for_backward(qkv_BL3HD, scale_H)
        return *_triton(qkv_BL3HD, scale_H), qkv_BL3HD[:, :, 2]

    @staticmethod
    def backward(ctx, dq_BLHD, dk_BLHD, dv_BLHD):
        qkv_BL3HD, scale_H = ctx.saved_tensors
        dqkv_BL3HD, dscale_H = _backward_triton(dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H)
        return dqkv_BL3HD, dscale_H.to(scale_H.dtype)


def _run(qkv_BL3HD, scale_H):
    from var_fast.kernels import qk_norm as kernel

    return kernel.forward(qkv_BL3HD, scale_H)


def _run_backward(dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H):
    from var_fast.kernels import qk_norm as kernel

    return kernel.backward(dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H)


def _fake(qkv_BL3HD, scale_H):
    B, L, _, H, D = qkv_BL3HD.shape
    return qkv_BL3HD.new_empty(B, L, H, D), qkv_BL3HD.new_empty(B, L, H, D)


_triton = register("qk_norm_triton", "(Tensor qkv_BL3HD, Tensor scale_H) -> (Tensor, Tensor)", _run, _fake)
_backward_triton = register(
    "qk_norm_backward_triton",
    "(Tensor dq_BLHD, Tensor dk_BLHD, Tensor dv_BLHD, Tensor qkv_BL3HD, Tensor scale_H) -> (Tensor, Tensor)",
    _run_backward,
    lambda dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H: (
        torch.empty_like(qkv_BL3HD, memory_format=torch.contiguous_format),
        torch.empty_like(scale_H, dtype=torch.float32, memory_format=torch.contiguous_format),
    ),
)
