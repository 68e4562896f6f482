"""scale_attention: a token of scale k sees all tokens of scales <= k (block-causal mask; VAR section 3.1, eq. 4)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from var_fast.ops.backend import BackendUnavailable, choose_backend, named_backend, native_problem
from var_fast.ops.library import register

HEAD_SIZES = (32, 64, 96, 128)
"""Channels of a head that the Triton kernels are made for."""


def scale_attention_reference(q_BLHD, k_BLHD, v_BLHD, patch_nums, softmax_scale):
    # One dense attention per scale over the prefix it may see: the same numbers as one masked attention over all
    # scales, without the masked third of the work.
    q_BHLD, k_BHLD, v_BHLD = (t.transpose(1, 2) for t in (q_BLHD, k_BLHD, v_BLHD))
    outs, begin = [], 0
    for pn in patch_nums:
        if begin == q_BHLD.shape[2]:
            break
        end = begin + pn * pn
        outs.append(
            F.scaled_dot_product_attention(
                q_BHLD[:, :, begin:end], k_BHLD[:, :, :end], v_BHLD[:, :, :end], scale=softmax_scale
            )
        )
        begin = end
    return torch.cat(outs, dim=2).transpose(1, 2)


def scale_attention(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    patch_nums: Sequence[int],
    softmax_scale: float,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(softmax_scale q k^T + mask) v, the mask open from a token to its own and all earlier scales.

    Shapes: q, k, v, result (B, L, H, D); L = sum(pn * pn) of `patch_nums` or of a prefix (progressive training).
    Under autocast all three are taken in its type. Triton takes float16, bfloat16 and float32 (its products in
    TensorFloat-32 only where torch.backends.cuda.matmul.allow_tf32) and D of 32, 64, 96 or 128; with backend "auto"
    the reference does the rest.
    Raises ValueError where L ends inside a scale, BackendUnavailable where a named backend cannot run.
    """
    L, ends = q_BLHD.shape[1], [0]
    for pn in patch_nums:
        ends.append(ends[-1] + pn * pn)
    if L == 0 or L not in ends:
        raise ValueError(f"q_BLHD has L = {L} tokens, expected a prefix of the scales {tuple(patch_nums)}: {ends[1:]}")
    if not q_BLHD.shape == k_BLHD.shape == v_BLHD.shape:
        raise ValueError(
            f"q, k, v have shapes {tuple(q_BLHD.shape)}, {tuple(k_BLHD.shape)}, {tuple(v_BLHD.shape)}: "
            "expected the same"
        )
    if choose_backend("scale_attention", q_BLHD.device, backend) == "triton":
        q_BLHD, k_BLHD, v_BLHD = _as_under_autocast(q_BLHD, k_BLHD, v_BLHD)
        problem = _triton_problem(q_BLHD, k_BLHD, v_BLHD, softmax_scale)
        if problem is None:
            return _triton(q_BLHD, k_BLHD, v_BLHD, ends[1 : ends.index(L) + 1], float(softmax_scale))[0]
        if "triton" in (backend, os.environ.get("VAR_FAST_BACKEND") if backend == "auto" else None):
            raise BackendUnavailable(f"scale_attention: backend 'triton' cannot run here: {problem}")
    elif named_backend(backend) != "reference" and _trains_on_cpu(q_BLHD, k_BLHD, v_BLHD):
        tensors = _as_under_autocast(q_BLHD, k_BLHD, v_BLHD)
        return _PrefixAttention.apply(*tensors, tuple(ends[1 : ends.index(L) + 1]), float(softmax_scale))
    return scale_attention_reference(q_BLHD, k_BLHD, v_BLHD, patch_nums, softmax_scale)


def _as_under_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In autocast's type, where it is on: what it does to scaled_dot_product_attention's arguments."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def _triton_problem(q_BLHD, k_BLHD, v_BLHD, softmax_scale) -> str | None:
    """Why the Triton kernels cannot take these arguments, or None."""
    if q_BLHD.shape[-1] not in HEAD_SIZES:
        return f"D = {q_BLHD.shape[-1]} channels a head, expected one of {', '.join(map(str, HEAD_SIZES))}"
    dtypes = {q_BLHD.dtype, k_BLHD.dtype, v_BLHD.dtype}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        return f"q, k, v are {', '.join(sorted(map(str, dtypes)))}, expected one type of float16, bfloat16 and float32"
    if not softmax_scale > 0:
        return f"softmax_scale is {softmax_scale}, expected a positive number"
    return None


# ---------------------------------------------------------------------------------------------------- training on CPUs
_attend = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_attend_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def _cpu_has_amx() -> bool:
    if native_problem() is not None:
        return False
    from var_fast import _C

    try:
        return _C.cpu_isa() == "amx"
    except ValueError:  # VAR_FAST_ISA names none: the operators will say so
        return False


_HAS_AMX = _cpu_has_amx()  # once: torch.compile cannot look into it


def _as_attend_wants(x_BLHD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, L, D) in `dtype`; called directly the operator takes it for granted that channels lie side by side."""
    x_BLHD = x_BLHD.to(dtype)
    return (x_BLHD if x_BLHD.stride(-1) == 1 else x_BLHD.contiguous()).transpose(1, 2)


def _trains_on_cpu(*tensors: torch.Tensor) -> bool:
    if None in (_attend, _attend_backward) or any(t.device.type != "cpu" or t.numel() == 0 for t in tensors):
        return False
    if len({t.dtype for t in _as_under_autocast(*(t[:0] for t in tensors))}) > 1:
        return False
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _PrefixAttention(torch.autograd.Function):
    """scale_attention_reference with a backward pass of its own: autograd's would write zeros for, and add up, the
    whole of q, k and v at every scale. Half types are computed in float32, whose backward pass takes a quarter of the
    time on CPUs without AMX (with AMX that was not measured)."""

    @staticmethod
    def forward(ctx, q_BLHD, k_BLHD, v_BLHD, ends, softmax_scale):
        dtype = q_BLHD.dtype if _HAS_AMX else torch.promote_types(q_BLHD.dtype, torch.float32)
        q_BHLD, k_BHLD, v_BHLD = (_as_attend_wants(t, dtype) for t in (q_BLHD, k_BLHD, v_BLHD))
        o_BLHD, lse, begin = q_BLHD.new_empty(q_BLHD.shape, dtype=dtype), [], 0
        for end in ends:
            o_BHlD, lse_BHl = _attend(
                q_BHLD[:, :, begin:end], k_BHLD[:, :, :end], v_BHLD[:, :, :end], scale=softmax_scale
            )
            o_BLHD[:, begin:end] = o_BHlD.transpose(1, 2)
            lse.append(lse_BHl)
            begin = end
        o_BLHD = o_BLHD.to(q_BLHD.dtype)
        ctx.save_for_backward(q_BLHD, k_BLHD, v_BLHD, o_BLHD, *lse)
        ctx.ends, ctx.softmax_scale, ctx.dtype = ends, softmax_scale, dtype
        return o_BLHD

    @staticmethod
    def backward(ctx, do_BLHD):
        saved = ctx.saved_tensors  # once: under activation checkpointing they can be had once only
        *tensors, do_BHLD = (_as_attend_wants(t, ctx.dtype) for t in (*saved[:4], do_BLHD))
        q_BHLD, k_BHLD, v_BHLD, o_BHLD = tensors
        dq_BLHD = torch.empty_like(q_BHLD.transpose(1, 2), memory_format=torch.contiguous_format)
        dk_BHLD = dv_BHLD = None
        # the last scale first: it sees all keys, so its gradients are what the others' are added to
        for begin, end, lse_BHl in reversed(list(zip((0, *ctx.ends), ctx.ends, saved[4:], strict=False))):
            own, seen = slice(begin, end), slice(0, end)
            dq_BHlD, dk_BHSD, dv_BHSD = _attend_backward(
                do_BHLD[:, :, own],
                q_BHLD[:, :, own],
                k_BHLD[:, :, seen],
                v_BHLD[:, :, seen],
                o_BHLD[:, :, own],
                lse_BHl,
                0.0,
                False,
                scale=ctx.softmax_scale,
            )
            dq_BLHD[:, own] = dq_BHlD.transpose(1, 2)
            if dk_BHLD is None:
                dk_BHLD, dv_BHLD = dk_BHSD, dv_BHSD
            else:
                dk_BHLD[:, :, seen] += dk_BHSD
                dv_BHLD[:, :, seen] += dv_BHSD
        dtype = do_BLHD.dtype
        return dq_BLHD.to(dtype), dk_BHLD.transpose(1, 2).to(dtype), dv_BHLD.transpose(1, 2).to(dtype), None, None


# ---------------------------------------------------------------------------------------------------- Triton, autograd
def _run(q_BLHD, k_BLHD, v_BLHD, ends, softmax_scale):
    from var_fast.kernels import scale_attention as kernel

    return kernel.forward(q_BLHD, k_BLHD, v_BLHD, ends, softmax_scale)


def _run_backward(do_BLHD, q_BLHD, k_BLHD, v_BLHD, o_BLHD, lse_BHL, ends, softmax_scale):
    from var_fast.kernels import scale_attention as kernel

    return kernel.backward(do_BLHD, q_BLHD, k_BLHD, v_BLHD, o_BLHD, lse_BHL, ends, softmax_scale)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(q_BLHD, k_BLHD, v_BLHD, ends, softmax_scale):
    B, L, H, _ = q_BLHD.shape
    return _like(q_BLHD), q_BLHD.new_empty(B, H, L, dtype=torch.float32)


def _save(ctx, inputs, output):
    q_BLHD, k_BLHD, v_BLHD, ctx.ends, ctx.softmax_scale = inputs
    o_BLHD, lse_BHL = output
    ctx.mark_non_differentiable(lse_BHL)
    ctx.save_for_backward(q_BLHD, k_BLHD, v_BLHD, o_BLHD, lse_BHL)


def _backward(ctx, do_BLHD, _):
    gradients = _backward_triton(do_BLHD, *ctx.saved_tensors, ctx.ends, ctx.softmax_scale)
    return *gradients, None, None


_triton = register(
    "scale_attention_triton",
    "(Tensor q_BLHD, Tensor k_BLHD, Tensor v_BLHD, int[] ends, float softmax_scale) -> (Tensor, Tensor)",
    _run,
    _fake,
    backward=_backward,
    setup_context=_save,
)
_backward_triton = register(
    "scale_attention_backward_triton",
    "(Tensor do_BLHD, Tensor q_BLHD, Tensor k_BLHD, Tensor v_BLHD, Tensor o_BLHD, Tensor lse_BHL, int[] ends,"
    " float softmax_scale) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    lambda do_BLHD, q_BLHD, k_BLHD, v_BLHD, o_BLHD, lse_BHL, ends, softmax_scale: (
        _like(q_BLHD),
        _like(k_BLHD),
        _like(v_BLHD),
    ),
)
