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
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run: native takes
    float32 and bfloat16.
    """
    _check_modulation(x_BLC, scale_BC=scale_BC, shift_BC=shift_BC)
    tensors = x_BLC, scale_BC, shift_BC
    chosen = choose_backend("adaln_modulate", x_BLC.device, backend, lambda: misfit(*tensors, differentiable=True))
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
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run: native takes
    float32 and bfloat16.
    """
    if branch_BLC.shape != x_BLC.shape:
        raise ValueError(f"branch_BLC has shape {tuple(branch_BLC.shape)}, expected x_BLC's, {tuple(x_BLC.shape)}")
    _check_modulation(x_BLC, gate_BC=gate_BC, scale_BC=scale_BC, shift_BC=shift_BC)
    tensors = x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC
    chosen = choose_backend(
        "residual_adaln_modulate", x_BLC.device, backend, lambda: misfit(*tensors, differentiable=True)
    )
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


# ------------------------------------------------------------------------------------------------------------ autograd
def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _per_image(x_BLC: torch.Tensor) -> torch.Tensor:
    return x_BLC.new_empty(x_BLC.shape[0], x_BLC.shape[2], dtype=torch.float32)


def _register(backend, run, run_backward, residual_run, residual_run_backward):
    """The operators (adaln_modulate, residual_adaln_modulate) of a backend, differentiable."""
    backward_op = register(
        f"adaln_modulate_backward_{backend}",
        "(Tensor dy_BLC, Tensor x_BLC, Tensor scale_BC, float eps) -> (Tensor, Tensor, Tensor)",
        run_backward,
        lambda dy_BLC, x_BLC, scale_BC, eps: (_like(x_BLC), _per_image(x_BLC), _per_image(x_BLC)),
    )
    residual_backward_op = register(
        f"residual_adaln_modulate_backward_{backend}",
        "(Tensor dx_out_BLC, Tensor dy_BLC, Tensor x_BLC, Tensor branch_BLC, Tensor gate_BC, Tensor scale_BC,"
        " float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        residual_run_backward,
        lambda dx_out_BLC, dy_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, eps: (
            _like(x_BLC),
            _like(branch_BLC),
            *(_per_image(x_BLC) for _ in range(3)),
        ),
    )

    def save(ctx, inputs, output):
        x_BLC, scale_BC, shift_BC, ctx.eps = inputs
        ctx.shift_dtype = shift_BC.dtype
        ctx.save_for_backward(x_BLC, scale_BC)

    def backward(ctx, dy_BLC):
        x_BLC, scale_BC = ctx.saved_tensors
        dx_BLC, dscale_BC, dshift_BC = backward_op(dy_BLC, x_BLC, scale_BC, ctx.eps)
        return dx_BLC, dscale_BC.to(scale_BC.dtype), dshift_BC.to(ctx.shift_dtype), None

    def residual_save(ctx, inputs, output):
        _, branch_BLC, gate_BC, scale_BC, shift_BC, ctx.eps = inputs
        ctx.shift_dtype = shift_BC.dtype
        ctx.save_for_backward(output[0], branch_BLC, gate_BC, scale_BC)

    def residual_backward(ctx, dx_out_BLC, dy_BLC):
        x_BLC, branch_BLC, gate_BC, scale_BC = ctx.saved_tensors
        dx_BLC, dbranch_BLC, dgate_BC, dscale_BC, dshift_BC = residual_backward_op(
            dx_out_BLC, dy_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, ctx.eps
        )
        per_image = dgate_BC.to(gate_BC.dtype), dscale_BC.to(scale_BC.dtype), dshift_BC.to(ctx.shift_dtype)
        return dx_BLC, dbranch_BLC, *per_image, None

    plain_op = register(
        f"adaln_modulate_{backend}",
        "(Tensor x_BLC, Tensor scale_BC, Tensor shift_BC, float eps) -> Tensor",
        run,
        lambda x_BLC, scale_BC, shift_BC, eps: _like(x_BLC),
        backward=backward,
        setup_context=save,
    )
    residual_op = register(
        f"residual_adaln_modulate_{backend}",
        "(Tensor x_BLC, Tensor branch_BLC, Tensor gate_BC, Tensor scale_BC, Tensor shift_BC, float eps)"
        " -> (Tensor, Tensor)",
        residual_run,
        lambda x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps: (_like(x_BLC), _like(x_BLC)),
        backward=residual_backward,
        setup_context=residual_save,
    )
    return plain_op, residual_op


# -------------------------------------------------------------------------------------------------------------- Triton
def _run_triton(x_BLC, scale_BC, shift_BC, eps):
    from var_fast.kernels import adaln_modulate as kernel

    return kernel.forward(x_BLC, None, None, scale_BC, shift_BC, eps)[1]


def _run_backward_triton(dy_BLC, x_BLC, scale_BC, eps):
    from var_fast.kernels import adaln_modulate as kernel

    dx_BLC, _, _, dscale_BC, dshift_BC = kernel.backward(dy_BLC, None, x_BLC, None, None, scale_BC, eps)
    return dx_BLC, dscale_BC, dshift_BC


def _residual_run_triton(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps):
    from var_fast.kernels import adaln_modulate as kernel

    return kernel.forward(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps)


def _residual_run_backward_triton(dx_out_BLC, dy_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, eps):
    from var_fast.kernels import adaln_modulate as kernel

    return kernel.backward(dy_BLC, dx_out_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, eps)


_triton, _residual_triton = _register(
    "triton", _run_triton, _run_backward_triton, _residual_run_triton, _residual_run_backward_triton
)


# -------------------------------------------------------------------------------------------------------------- native
def _run_native(x_BLC, scale_BC, shift_BC, eps):
    return _forward_native(x_BLC, None, None, scale_BC, shift_BC, eps)[1]


def _residual_run_native(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps):
    return _forward_native(x_BLC, _of_a_native_type(branch_BLC), gate_BC, scale_BC, shift_BC, eps)


def _run_backward_native(dy_BLC, x_BLC, scale_BC, eps):
    dx_BLC, _, _, dscale_BC, dshift_BC = _backward_native(None, dy_BLC, x_BLC, None, None, scale_BC, eps)
    return dx_BLC, dscale_BC, dshift_BC


def _residual_run_backward_native(dx_out_BLC, dy_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, eps):
    branch = _of_a_native_type(branch_BLC)
    dx_BLC, dbranch_BLC, *per_image = _backward_native(dx_out_BLC, dy_BLC, x_BLC, branch, gate_BC, scale_BC, eps)
    return dx_BLC, dbranch_BLC.to(branch_BLC.dtype), *per_image


def _of_a_native_type(branch_BLC):
    return (branch_BLC if branch_BLC.dtype in TYPES else branch_BLC.float()).contiguous()


def _forward_native(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps):
    from var_fast import _C

    x_BLC = x_BLC.contiguous()
    x_out_BLC, y_BLC = None if branch_BLC is None else _like(x_BLC), _like(x_BLC)
    gate_BC, scale_BC, shift_BC = (as_float32(m_BC) for m_BC in (gate_BC, scale_BC, shift_BC))
    _C.cpu_residual_adaln_modulate_forward(
        pointer(x_BLC),
        TYPES[x_BLC.dtype],
        pointer(branch_BLC),
        0 if branch_BLC is None else TYPES[branch_BLC.dtype],
        pointer(gate_BC),
        pointer(scale_BC),
        pointer(shift_BC),
        *x_BLC.shape,
        eps,
        pointer(x_out_BLC),
        pointer(y_BLC),
        torch.get_num_threads(),
    )
    return x_out_BLC, y_BLC


def _backward_native(dx_out_BLC, dy_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, eps):
    from var_fast import _C

    x_BLC = x_BLC.contiguous()
    dy_BLC = dy_BLC.to(x_BLC.dtype).contiguous()
    if branch_BLC is not None:
        dx_out_BLC = dx_out_BLC.to(x_BLC.dtype).contiguous()
    gate_BC, scale_BC = as_float32(gate_BC), as_float32(scale_BC)
    dx_BLC, dbranch_BLC = _like(x_BLC), None if branch_BLC is None else _like(branch_BLC)
    dgate_BC = None if branch_BLC is None else _per_image(x_BLC)
    dscale_BC, dshift_BC = _per_image(x_BLC), _per_image(x_BLC)
    _C.cpu_residual_adaln_modulate_backward(
        pointer(dx_out_BLC),
        pointer(dy_BLC),
        pointer(x_BLC),
        TYPES[x_BLC.dtype],
        pointer(branch_BLC),
        0 if branch_BLC is None else TYPES[branch_BLC.dtype],
        pointer(gate_BC),
        pointer(scale_BC),
        *x_BLC.shape,
        eps,
        pointer(dx_BLC),
        pointer(dbranch_BLC),
        pointer(dgate_BC),
        pointer(dscale_BC),
        pointer(dshift_BC),
        torch.get_num_threads(),
    )
    return dx_BLC, dbranch_BLC, dgate_BC, dscale_BC, dshift_BC


_native, _residual_native = _register(
    "native", _run_native, _run_backward_native, _residual_run_native, _residual_run_backward_native
)
