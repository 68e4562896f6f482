"""group_norm_silu: the norm and activation before every convolution of the tokenizer's encoder and decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend
from var_fast.ops.library import register


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
    Under autocast the reference's result is float32; Triton computes in float32 and gives x's type.
    Raises ValueError where they do not fit, BackendUnavailable where a named backend cannot run.
    """
    if x_BChw.shape[1] % groups:
        raise ValueError(f"x_BChw has {x_BChw.shape[1]} channels, expected a multiple of groups = {groups}")
    if choose_backend("group_norm_silu", x_BChw.device, backend) == "triton":
        return _triton(x_BChw, weight_C, bias_C, groups, float(eps))[0]
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
