"""gelu: the activation of the FFN (tanh form), which the published code has torch compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend
from var_fast.ops.library import register
from var_fast.ops.native import TYPES, misfit, pointer


def gelu_reference(x):
    return F.gelu(x, approximate="tanh")


def gelu(x: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 of every element, in x's shape and type.

    There is no Triton kernel: torch's own is bound by memory too. native has no second derivative.
    Raises BackendUnavailable where a named backend cannot run: native takes float32 and bfloat16.
    """
    if choose_backend("gelu", x.device, backend, lambda: misfit(x, differentiable=True)) == "native":
        return _native(x)
    return gelu_reference(x)


def _run(x):
    from var_fast import _C

    x = x.contiguous()
    y = torch.empty_like(x)
    _C.cpu_gelu(pointer(x), TYPES[x.dtype], x.numel(), pointer(y), torch.get_num_threads())
    return y


def _run_backward(dy, x):
    from var_fast import _C

    x, dy = x.contiguous(), dy.to(x.dtype).contiguous()
    dx = torch.empty_like(x)
    _C.cpu_gelu_backward(pointer(dy), pointer(x), TYPES[x.dtype], x.numel(), pointer(dx), torch.get_num_threads())
    return dx


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_backward_native = register(
    "gelu_backward_native", "(Tensor dy, Tensor x) -> Tensor", _run_backward, lambda dy, x: _like(x)
)
_native = register(
    "gelu_native",
    "(Tensor x) -> Tensor",
    _run,
    _like,
    backward=lambda ctx, dy: _backward_native(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
