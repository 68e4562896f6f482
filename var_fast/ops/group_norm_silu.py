"""group_norm_silu: the norm and activation before every convolution of the tokenizer's encoder and decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend, named_backend
from var_fast.ops.library import register
from var_fast.ops.native import TYPES, as_float32, misfit, pointer


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

    Shapes: x (B, C, h, w), weight and bias (C,), result (B, C, h, w) in x's memory format; C a multiple of `groups`.
    Under autocast the reference's result is float32 on CUDA; Triton and native compute in float32 and give x's type.
    Raises ValueError where they do not fit, BackendUnavailable where a named backend cannot run: native has no
    gradient, takes float32 and bfloat16, and is chosen where x is channels last.
    """
    if x_BChw.shape[1] % groups:
        raise ValueError(f"x_BChw has {x_BChw.shape[1]} channels, expected a multiple of groups = {groups}")
    tensors = x_BChw, weight_C, bias_C
    chosen = choose_backend(
        "group_norm_silu", x_BChw.device, backend, lambda: _native_misfit(*tensors, groups, backend)
    )
    if chosen == "triton":
        return _triton(*tensors, groups, float(eps))[0]
    if chosen == "native":
        return _native(*tensors, groups, float(eps))
    return group_norm_silu_reference(x_BChw, weight_C, bias_C, groups, eps)


# ---------------------------------------------------------------------------------------------------- Triton, autograd
def _run(x_BChw, weight_C, bias_C, groups, eps):
    from var_fast.kernels import group_norm_silu as kernel

    return kernel.forward(x_BChw, weight_C, bias_C, groups, eps)


def _run_backward(dy_BChw, x_BChw, mean_BC, rstd_BC, weight_C, bias_C, groups):
    from var_fast.kernels import group_norm_silu as kernel

    return kernel.backward(dy_BChw, x_BChw, mean_BC, rstd_BC, weight_C, bias_C, groups)


def _like(x_BChw: torch.Tensor) -> torch.Tensor:
    from var_fast.kernels import group_norm_silu as kernel

    return torch.empty_like(x_BChw, memory_format=kernel.memory_format(x_BChw))


def _save(ctx, inputs, output):
    x_BChw, weight_C, bias_C, ctx.groups, _ = inputs
    _, mean_BC, rstd_BC = output
    ctx.mark_non_differentiable(mean_BC, rstd_BC)
    ctx.save_for_backward(x_BChw, mean_BC, rstd_BC, weight_C, bias_C)


def _backward(ctx, dy_BChw, *_):
    dx_BChw, dweight_C, dbias_C = _backward_triton(dy_BChw, *ctx.saved_tensors, ctx.groups)
    *_, weight_C, bias_C = ctx.saved_tensors
    return dx_BChw, dweight_C.to(weight_C.dtype), dbias_C.to(bias_C.dtype), None, None


def _fake(x_BChw, weight_C, bias_C, groups, eps):
    mean_BC, rstd_BC = (x_BChw.new_empty(x_BChw.shape[:2], dtype=torch.float32) for _ in range(2))
    return _like(x_BChw), mean_BC, rstd_BC


def _fake_backward(dy_BChw, x_BChw, mean_BC, rstd_BC, weight_C, bias_C, groups):
    dweight_C, dbias_C = (x_BChw.new_empty(x_BChw.shape[1], dtype=torch.float32) for _ in range(2))
    return _like(x_BChw), dweight_C, dbias_C


_triton = register(
    "group_norm_silu_triton",
    "(Tensor x_BChw, Tensor weight_C, Tensor bias_C, int groups, float eps) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    backward=_backward,
    setup_context=_save,
)
_backward_triton = register(
    "group_norm_silu_backward_triton",
    "(Tensor dy_BChw, Tensor x_BChw, Tensor mean_BC, Tensor rstd_BC, Tensor weight_C, Tensor bias_C, int groups)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


# -------------------------------------------------------------------------------------------------- native, no gradient
def _native_misfit(x_BChw, weight_C, bias_C, groups, backend) -> str | None:
    if x_BChw.dim() != 4 or weight_C.shape != x_BChw.shape[1:2] or bias_C.shape != weight_C.shape:
        return "it takes x (B, C, h, w), weight (C,) and bias (C,)"
    if x_BChw.numel() <= groups:
        return "it takes more than one value per group"
    if named_backend(backend) != "native" and not x_BChw.is_contiguous(memory_format=torch.channels_last):
        return "it works channels last, and the two copies of another format would cost more than it gains"
    # float32 layers beside bfloat16 maps are common, and the reference takes them too
    parameters = (
        () if x_BChw.dtype == torch.bfloat16 and weight_C.dtype == bias_C.dtype == torch.float32 else (weight_C, bias_C)
    )
    return misfit(x_BChw, *parameters)


def _run_native(x_BChw, weight_C, bias_C, groups, eps):
    from var_fast import _C

    B, C, h, w = x_BChw.shape
    x_last_BChw = x_BChw.contiguous(memory_format=torch.channels_last)
    y_BChw = torch.empty_like(x_last_BChw)
    weight_C, bias_C = as_float32(weight_C), as_float32(bias_C)
    _C.cpu_group_norm_silu(
        pointer(x_last_BChw),
        TYPES[x_BChw.dtype],
        pointer(weight_C),
        pointer(bias_C),
        B,
        h * w,
        C,
        groups,
        eps,
        True,  # SiLU
        pointer(y_BChw),
        TYPES[x_BChw.dtype],
        torch.get_num_threads(),
    )
    return y_BChw.contiguous(memory_format=_native_format(x_BChw))


def _native_format(x_BChw):
    last = x_BChw.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


_native = register(
    "group_norm_silu_native",
    "(Tensor x_BChw, Tensor weight_C, Tensor bias_C, int groups, float eps) -> Tensor",
    _run_native,
    lambda x_BChw, weight_C, bias_C, groups, eps: torch.empty_like(x_BChw, memory_format=_native_format(x_BChw)),
)
