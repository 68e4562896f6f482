"""adaln_modulate: layer norm whose scale and shift come from the condition (adaptive layer norm; VAR section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend
from var_fast.ops.library import register
from var_fast.ops.native import TYPES, as_float32, misfit, pointer


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
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run: native has no
    gradient, and takes float32 and bfloat16.
    """
    _check_modulation(x_BLC, scale_BC=scale_BC, shift_BC=shift_BC)
    tensors = x_BLC, scale_BC, shift_BC
    chosen = choose_backend("adaln_modulate", x_BLC.device, backend, lambda: misfit(*tensors))
    if chosen != "reference":
        return (_triton if chosen == "triton" else _native)(*tensors, float(eps))
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
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run: native has no
    gradient, and takes float32 and bfloat16.
    """
    if branch_BLC.shape != x_BLC.shape:
        raise ValueError(f"branch_BLC has shape {tuple(branch_BLC.shape)}, expected x_BLC's, {tuple(x_BLC.shape)}")
    _check_modulation(x_BLC, gate_BC=gate_BC, scale_BC=scale_BC, shift_BC=shift_BC)
    tensors = x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC
    chosen = choose_backend("residual_adaln_modulate", x_BLC.device, backend, lambda: misfit(*tensors))
    if chosen != "reference":
        return (_residual_triton if chosen == "triton" else _residual_native)(*tensors, float(eps))
    return residual_adaln_modulate_reference(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps)


def _check_modulation(x_BLC, **per_image):
    if x_BLC.dim() != 3:
        raise ValueError(f"x_BLC has shape {tuple(x_BLC.shape)}, expected (B, L, C)")
    expected = (x_BLC.shape[0], x_BLC.shape[2])
    for name, tensor in per_image.items():
        if tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (B, C) = {expected}")


# ---------------------------------------------------------------------------------------------------- Triton, autograd
def _run(x_BLC, scale_BC, shift_BC, eps):
    from var_fast.kernels import adaln_modulate as kernel

    return kernel.forward(x_BLC, None, None, scale_BC, shift_BC, eps)[1]


def _run_backward(dy_BLC, x_BLC, scale_BC, eps):
    from var_fast.kernels import adaln_modulate as kernel

    dx_BLC, _, _, dscale_BC, dshift_BC = kernel.backward(dy_BLC, None, x_BLC, None, None, scale_BC, eps)
    return dx_BLC, dscale_BC, dshift_BC


def _residual_run(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps):
    from var_fast.kernels import adaln_modulate as kernel

    return kernel.forward(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps)


def _residual_run_backward(dx_out_BLC, dy_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, eps):
    from var_fast.kernels import adaln_modulate as kernel

    return kernel.backward(dy_BLC, dx_out_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, eps)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _per_image(x_BLC: torch.Tensor) -> torch.Tensor:
    return x_BLC.new_empty(x_BLC.shape[0], x_BLC.shape[2], dtype=torch.float32)


def _save(ctx, inputs, output):
    x_BLC, scale_BC, shift_BC, ctx.eps = inputs
    ctx.shift_dtype = shift_BC.dtype
    ctx.save_for_backward(x_BLC, scale_BC)


def _backward(ctx, dy_BLC):
    x_BLC, scale_BC = ctx.saved_tensors
    dx_BLC, dscale_BC, dshift_BC = _backward_triton(dy_BLC, x_BLC, scale_BC, ctx.eps)
    return dx_BLC, dscale_BC.to(scale_BC.dtype), dshift_BC.to(ctx.shift_dtype), None


def _residual_save(ctx, inputs, output):
    _, branch_BLC, gate_BC, scale_BC, shift_BC, ctx.eps = inputs
    ctx.shift_dtype = shift_BC.dtype
    ctx.save_for_backward(output[0], branch_BLC, gate_BC, scale_BC)


def _residual_backward(ctx, dx_out_BLC, dy_BLC):
    x_BLC, branch_BLC, gate_BC, scale_BC = ctx.saved_tensors
    dx_BLC, dbranch_BLC, dgate_BC, dscale_BC, dshift_BC = _residual_backward_triton(
        dx_out_BLC, dy_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, ctx.eps
    )
    per_image = dgate_BC.to(gate_BC.dtype), dscale_BC.to(scale_BC.dtype), dshift_BC.to(ctx.shift_dtype)
    return dx_BLC, dbranch_BLC, *per_image, None


_triton = register(
    "adaln_modulate_triton",
    "(Tensor x_BLC, Tensor scale_BC, Tensor shift_BC, float eps) -> Tensor",
    _run,
    lambda x_BLC, scale_BC, shift_BC, eps: _like(x_BLC),
    backward=_backward,
    setup_context=_save,
)
_backward_triton = register(
    "adaln_modulate_backward_triton",
    "(Tensor dy_BLC, Tensor x_BLC, Tensor scale_BC, float eps) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    lambda dy_BLC, x_BLC, scale_BC, eps: (_like(x_BLC), _per_image(x_BLC), _per_image(x_BLC)),
)
_residual_triton = register(
    "residual_adaln_modulate_triton",
    "(Tensor x_BLC, Tensor branch_BLC, Tensor gate_BC, Tensor scale_BC, Tensor shift_BC, float eps)"
    " -> (Tensor, Tensor)",
    _residual_run,
    lambda x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps: (_like(x_BLC), _like(x_BLC)),
    backward=_residual_backward,
    setup_context=_residual_save,
)
_residual_backward_triton = register(
    "residual_adaln_modulate_backward_triton",
    "(Tensor dx_out_BLC, Tensor dy_BLC, Tensor x_BLC, Tensor branch_BLC, Tensor gate_BC, Tensor scale_BC, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _residual_run_backward,
    lambda dx_out_BLC, dy_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, eps: (
        _like(x_BLC),
        _like(branch_BLC),
        *(_per_image(x_BLC) for _ in range(3)),
    ),
)


# -------------------------------------------------------------------------------------------------- native, no gradient
def _run_native(x_BLC, scale_BC, shift_BC, eps):
    return _call_native(as_float32(x_BLC), None, None, scale_BC, shift_BC, eps, x_BLC.dtype)


def _residual_run_native(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps):
    # in float32, and a copy: the extension adds to it in place
    x_new_BLC = x_BLC.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    branch_BLC = (branch_BLC if branch_BLC.dtype in TYPES else branch_BLC.float()).contiguous()
    y_BLC = _call_native(x_new_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps, x_BLC.dtype)
    return x_new_BLC.to(x_BLC.dtype), y_BLC


def _call_native(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps, dtype):
    from var_fast import _C

    B, L, C = x_BLC.shape
    y_BLC = x_BLC.new_empty(B, L, C, dtype=dtype)
    gate_BC, scale_BC, shift_BC = (as_float32(m_BC) for m_BC in (gate_BC, scale_BC, shift_BC))
    _C.cpu_residual_adaln_modulate(
        pointer(x_BLC),
        pointer(branch_BLC),
        0 if branch_BLC is None else TYPES[branch_BLC.dtype],
        pointer(gate_BC),
        pointer(scale_BC),
        pointer(shift_BC),
        C,  # stride
        B,  # rows of gate, scale and shift
        B,
        L,
        C,
        eps,
        pointer(y_BLC),
        TYPES[dtype],
        torch.get_num_threads(),
    )
    return y_BLC


_native = register(
    "adaln_modulate_native",
    "(Tensor x_BLC, Tensor scale_BC, Tensor shift_BC, float eps) -> Tensor",
    _run_native,
    lambda x_BLC, scale_BC, shift_BC, eps: _like(x_BLC),
)
_residual_native = register(
    "residual_adaln_modulate_native",
    "(Tensor x_BLC, Tensor branch_BLC, Tensor gate_BC, Tensor scale_BC, Tensor shift_BC, float eps)"
    " -> (Tensor, Tensor)",
    _residual_run_native,
    lambda x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps: (_like(x_BLC), _like(x_BLC)),
)
