"""qk_norm: split the packed projection and normalise queries and keys (attn_l2_norm; VAR section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend
from var_fast.ops.library import register
from var_fast.ops.native import TYPES, as_float32, pointer


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
    and native (float32 and bfloat16 only) compute in float32 and give them in qkv's type.
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run.
    """
    if qkv_BL3HD.dim() != 5 or qkv_BL3HD.shape[2] != 3:
        raise ValueError(f"qkv_BL3HD has shape {tuple(qkv_BL3HD.shape)}, expected (B, L, 3, H, D)")
    if scale_H is not None and scale_H.shape != qkv_BL3HD.shape[3:4]:
        raise ValueError(f"scale_H has shape {tuple(scale_H.shape)}, expected (H,) = ({qkv_BL3HD.shape[3]},)")
    chosen = choose_backend("qk_norm", qkv_BL3HD.device, backend, lambda: _native_misfit(qkv_BL3HD, scale_H))
    if chosen != "reference" and scale_H is not None:
        return _QKNorm.apply(qkv_BL3HD, scale_H, chosen)
    return qk_norm_reference(qkv_BL3HD, scale_H)


def _native_misfit(qkv_BL3HD: torch.Tensor, scale_H: torch.Tensor | None) -> str | None:
    if scale_H is not None and scale_H.device != qkv_BL3HD.device:
        return f"it was given tensors on {qkv_BL3HD.device} and {scale_H.device}"
    return None if qkv_BL3HD.dtype in TYPES else f"it computes in float32 or bfloat16, and was given {qkv_BL3HD.dtype}"


# ------------------------------------------------------------------------------------------------------------ autograd
# v has to be both a view (an operator of torch.library may not return one) and an output whose gradient the backward
# kernel packs together with those of q and k. So autograd sees a Function around two operators. In bytes, N those of
# one of q, k, v, forward + backward:
#   this Function                                              4 N +  8 N = 12 N, the least possible
#   an operator that returns a copy of v                       6 N +  8 N = 14 N, and N more memory kept
#   an operator on unbound q and k, their gradients stacked    4 N + 12 N = 16 N
#   an operator on qkv, v sliced outside (zeros, then a sum)   4 N + 21 N = 25 N
class _QKNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_BL3HD, scale_H, backend):
        ctx.backend = backend
        ctx.save_for_backward(qkv_BL3HD, scale_H)
        return *_FORWARD[backend](qkv_BL3HD, scale_H), qkv_BL3HD[:, :, 2]

    @staticmethod
    def backward(ctx, dq_BLHD, dk_BLHD, dv_BLHD):
        qkv_BL3HD, scale_H = ctx.saved_tensors
        dqkv_BL3HD, dscale_H = _BACKWARD[ctx.backend](dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H)
        return dqkv_BL3HD, dscale_H.to(scale_H.dtype), None


def _run_triton(qkv_BL3HD, scale_H):
    from var_fast.kernels import qk_norm as kernel

    return kernel.forward(qkv_BL3HD, scale_H)


def _run_backward_triton(dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H):
    from var_fast.kernels import qk_norm as kernel

    return kernel.backward(dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H)


def _run_native(qkv_BL3HD, scale_H):
    from var_fast import _C

    qkv_BL3HD, scale_H = qkv_BL3HD.contiguous(), as_float32(scale_H)
    B, L, _, H, D = qkv_BL3HD.shape
    q_BLHD, k_BLHD = _fake(qkv_BL3HD, scale_H)
    _C.cpu_qk_norm_forward(
        pointer(qkv_BL3HD),
        TYPES[qkv_BL3HD.dtype],
        pointer(scale_H),
        B * L,
        H,
        D,
        pointer(q_BLHD),
        pointer(k_BLHD),
        torch.get_num_threads(),
    )
    return q_BLHD, k_BLHD


def _run_backward_native(dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H):
    from var_fast import _C

    qkv_BL3HD, scale_f32_H = qkv_BL3HD.contiguous(), as_float32(scale_H)
    B, L, _, H, D = qkv_BL3HD.shape
    gradients = [g.to(qkv_BL3HD.dtype) for g in (dq_BLHD, dk_BLHD, dv_BLHD)]
    gradients = [g if g.stride(-1) == 1 else g.contiguous() for g in gradients]
    dqkv_BL3HD, dscale_H = _fake_backward(*gradients, qkv_BL3HD, scale_H)
    _C.cpu_qk_norm_backward(
        *map(pointer, gradients),
        [stride for g in gradients for stride in g.stride()[:3]],
        pointer(qkv_BL3HD),
        TYPES[qkv_BL3HD.dtype],
        pointer(scale_f32_H),
        B,
        L,
        H,
        D,
        pointer(dqkv_BL3HD),
        pointer(dscale_H),
        torch.get_num_threads(),
    )
    return dqkv_BL3HD, dscale_H


def _fake(qkv_BL3HD, scale_H):
    B, L, _, H, D = qkv_BL3HD.shape
    return qkv_BL3HD.new_empty(B, L, H, D), qkv_BL3HD.new_empty(B, L, H, D)


def _fake_backward(dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H):
    return (
        torch.empty_like(qkv_BL3HD, memory_format=torch.contiguous_format),
        torch.empty_like(scale_H, dtype=torch.float32, memory_format=torch.contiguous_format),
    )


_FORWARD = {
    backend: register(f"qk_norm_{backend}", "(Tensor qkv_BL3HD, Tensor scale_H) -> (Tensor, Tensor)", run, _fake)
    for backend, run in (("triton", _run_triton), ("native", _run_native))
}
_BACKWARD = {
    backend: register(
        f"qk_norm_backward_{backend}",
        "(Tensor dq_BLHD, Tensor dk_BLHD, Tensor dv_BLHD, Tensor qkv_BL3HD, Tensor scale_H) -> (Tensor, Tensor)",
        run,
        _fake_backward,
    )
    for backend, run in (("triton", _run_backward_triton), ("native", _run_backward_native))
}
