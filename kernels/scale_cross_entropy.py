"""scale_cross_entropy by chunks of tokens: the logits of a chunk live in one buffer and never exist all at once.

The products are cuBLAS's. Between them one kernel adds the bias to the logits of a token, a row, computes its
cross-entropy and, where gradients are wanted, overwrites the logits with the gradient of that. So the chunk's share of
the gradients follows at once, and the logits are computed once for forward and backward (the idea of Liger-Kernel's
fused linear cross-entropy). What is not known then, the upstream gradient of the loss, is one number: the backward
multiplies by it.

Half types: the gradient of a row is stored as a part of the largest token weight, so with magnitudes up to 1, whatever
the number of tokens; 1 / (B L) times a probability would be no float16. That factor, in float32, is a result.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from var_fast.kernels.configuration import Configuration

LARGEST_BLOCK = 8192
"""Logits that a program holds in registers. Of a longer row it reads the rest twice."""
LEAST_ROWS, MOST_ROWS = 1024, 4096
"""Of a chunk: fewer leave a part of an H200 idle in the products, more do not stay in its cache."""
IGNORED = tl.constexpr(-100)
"""A target without loss and gradient, as in F.cross_entropy."""
SCALE_BLOCK = 4096


@triton.jit
def _load(logits_ptr, bias_ptr, columns, V: tl.constexpr, BIASED: tl.constexpr):
    """Logits of a row, -inf outside; statistics are in float32, or in float64 where the logits are."""
    x = tl.load(logits_ptr + columns, columns < V, -float("inf"))
    x = x if x.dtype == tl.float64 else x.to(tl.float32)
    if BIASED:
        x += tl.load(bias_ptr + columns, columns < V, 0.0).to(x.dtype)
    return x


@triton.jit
def _store_gradient(
    logits_ptr, x, columns, top, total, target, weight, V: tl.constexpr, SMOOTHING: tl.constexpr
):  # fmt: skip
    gradient = tl.exp(x - top) / total - SMOOTHING / V
    gradient = tl.where(columns == target, gradient - (1.0 - SMOOTHING), gradient)
    tl.store(logits_ptr + columns, (gradient * weight).to(logits_ptr.dtype.element_ty), columns < V)


@triton.jit
def row_kernel(
    logits_ptr, bias_ptr, target_ptr, token_weight_ptr, largest_ptr, ce_ptr, hit_ptr,
    V: tl.constexpr, SMOOTHING: tl.constexpr,
    BIASED: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    ignored = target == IGNORED
    target = tl.where(known, target, -1).to(tl.int32)
    # another target reads nothing: it makes loss and gradient NaN
    x_target = _load(logits_ptr, bias_ptr, tl.where(known, target, 0), V, BIASED)
    x_target = tl.where(known, x_target, float("nan"))

    # the first block stays in registers until its gradient is stored; most vocabularies have no other
    columns = tl.arange(0, BLOCK)
    x = _load(logits_ptr, bias_ptr, columns, V, BIASED)
    top = tl.max(x, axis=0)
    first = tl.min(tl.where(x == top, columns, V), axis=0)
    total = tl.sum(tl.exp(x - top), axis=0)
    if SMOOTHING > 0:
        plain = tl.sum(tl.where(columns < V, x, 0.0), axis=0)
    for begin in range(BLOCK, V, BLOCK):
        more = _load(logits_ptr, bias_ptr, begin + columns, V, BIASED)
        block_top = tl.max(more, axis=0)
        block_first = tl.min(tl.where(more == block_top, begin + columns, V), axis=0)
        first = tl.where(block_top > top, block_first, first)
        new_top = tl.maximum(top, block_top)
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(more - new_top), axis=0)
        top = new_top
        if SMOOTHING > 0:
            plain += tl.sum(tl.where(begin + columns < V, more, 0.0), axis=0)

    # differences from the top first: a small loss of large logits keeps its digits
    ce = tl.log(total) + (1.0 - SMOOTHING) * (top - x_target)
    if SMOOTHING > 0:
        ce += SMOOTHING * (top - plain / V)
    tl.store(ce_ptr + row, tl.where(ignored, 0.0, ce))
    tl.store(hit_ptr + row, tl.where(first == target, 1.0, 0.0))

    if GRADIENT:
        weight = tl.where(known, 1.0, float("nan"))
        if WEIGHTED:
            largest = tl.load(largest_ptr)
            weight *= tl.load(token_weight_ptr + row) / tl.where(largest > 0, largest, 1.0)
        weight = tl.where(ignored, 0.0, weight)
        _store_gradient(logits_ptr, x, columns, top, total, target, weight, V, SMOOTHING)
        for begin in range(BLOCK, V, BLOCK):
            more = _load(logits_ptr, bias_ptr, begin + columns, V, BIASED)
            _store_gradient(logits_ptr, more, begin + columns, top, total, target, weight, V, SMOOTHING)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr)
    x = tl.load(x_ptr + at, at < N).to(factor.dtype)
    tl.store(y_ptr + at, (x * factor).to(y_ptr.dtype.element_ty), at < N)


def chunk_rows(rows: int) -> int:
    """Tokens of a chunk, of `rows` in all: at most a sixteenth, a power of two so that the products' tiles come out
    even, within LEAST_ROWS and MOST_ROWS."""
    share = 1 << max(rows // 16, 1).bit_length() - 1
    return min(max(LEAST_ROWS, min(share, MOST_ROWS)), max(rows, 1))


def launch_options(V: int) -> tuple[int, int]:
    """(logits, warps) of a program's block."""
    block = min(triton.next_power_of_2(V), LARGEST_BLOCK)
    return block, max(4, block // 512)


def forward(h_BLC, weight_VC, bias_V, target_BL, token_weight_BL, label_smoothing, dtype, wanted):
    """(loss, (cross-entropy, hit) of every token (2, B, L), dh, dweight, dbias, scale).

    Products are in `dtype`; everything else but dh, which has h's type, is in float32 (float64 where `dtype` is). The
    gradient of the loss for h is scale * dh, and so on; `wanted`: which of the three, the others are empty.
    """
    B, L, C = h_BLC.shape
    V, N = weight_VC.shape[0], B * L
    wide = torch.promote_types(dtype, torch.float32)
    h_NC, target_N = h_BLC.reshape(N, C), target_BL.reshape(N)
    weight_VC = weight_VC.to(dtype)
    bias_V = None if bias_V is None else bias_V.contiguous()
    if token_weight_BL is None:
        token_weight_N, largest = target_N, target_N  # unused
        scale = h_BLC.new_full((), 1 / max(N, 1), dtype=wide)
    else:
        token_weight_BL = token_weight_BL.to(wide)
        token_weight_N = token_weight_BL.reshape(N)
        largest = token_weight_N.abs().amax() if N else token_weight_N.sum()
        scale = largest / max(B, 1)
    rows = chunk_rows(N)
    dh_wanted, dweight_wanted, dbias_wanted = wanted
    statistics_2N = h_NC.new_empty(2, N, dtype=wide)
    logits_RV = h_NC.new_empty(rows, V, dtype=dtype)
    dh_NC = h_NC.new_empty(N, C) if dh_wanted else h_NC.new_empty(0)
    dweight_VC = h_NC.new_zeros((V, C) if dweight_wanted else 0, dtype=wide)
    dbias_PV = h_NC.new_empty(triton.cdiv(N, rows), V, dtype=wide) if dbias_wanted else None
    block, warps = launch_options(V)
    for i, begin in enumerate(range(0, N, rows)):
        part = slice(begin, begin + rows)
        h_RC = h_NC[part].to(dtype)
        chunk_RV = logits_RV[: len(h_RC)]
        torch.mm(h_RC, weight_VC.t(), out=chunk_RV)
        row_kernel[(len(h_RC),)](
            chunk_RV, weight_VC if bias_V is None else bias_V,
            target_N[part], token_weight_N[part], largest, *statistics_2N[:, part].unbind(0),
            V=V, SMOOTHING=label_smoothing, BIASED=bias_V is not None, WEIGHTED=token_weight_BL is not None,
            GRADIENT=any(wanted), BLOCK=block, num_warps=warps,
        )  # fmt: skip
        if dh_wanted and dh_NC.dtype == dtype:
            torch.mm(chunk_RV, weight_VC, out=dh_NC[part])
        elif dh_wanted:
            dh_NC[part] = torch.mm(chunk_RV, weight_VC)
        if dweight_wanted:
            _add_product(dweight_VC, chunk_RV.t(), h_RC)
        if dbias_wanted:
            dbias_PV[i] = _column_sums(chunk_RV, wide)
    statistics_2BL = statistics_2N.view(2, B, L)
    ce_BL = statistics_2BL[0]
    loss = ce_BL.mean() if token_weight_BL is None else (ce_BL * token_weight_BL).sum(1).mean()
    dbias_V = dbias_PV.sum(0) if dbias_wanted else h_NC.new_empty(0, dtype=wide)
    return loss, statistics_2BL, dh_NC.view(B, L, C) if dh_wanted else dh_NC, dweight_VC, dbias_V, scale


def scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, in_place: bool) -> torch.Tensor:
    """x * factor, a tensor () of float32 or float64 in which they are multiplied, as `dtype`; in x itself if
    `in_place` and if it has that type."""
    y = x if in_place and x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](x, factor, y, x.numel(), BLOCK=SCALE_BLOCK, num_warps=8)
    return y


def _add_product(sum_MN: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor) -> None:
    """sum += a b, where the sum may have a wider type than the factors."""
    if a_MK.dtype == sum_MN.dtype:
        sum_MN.addmm_(a_MK, b_KN)
    elif not a_MK.is_cuda:
        sum_MN.addmm_(a_MK.to(sum_MN.dtype), b_KN.to(sum_MN.dtype))
    elif _adds_into_float32(a_MK.device):
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=sum_MN.dtype, out=sum_MN)
    else:
        sum_MN += torch.mm(a_MK, b_KN, out_dtype=sum_MN.dtype)


def _column_sums(x_RV: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of the rows, as `dtype`. On CUDA as a product: torch.sum over rows that lie apart takes 64 MiB for its
    parts of a chunk, more than half of what the operator holds else."""
    if not x_RV.is_cuda:
        return torch.sum(x_RV, 0, dtype=dtype)
    ones_1R = x_RV.new_ones(1, len(x_RV))
    return (torch.mm(ones_1R, x_RV) if x_RV.dtype == dtype else torch.mm(ones_1R, x_RV, out_dtype=dtype))[0]


@cache
def _adds_into_float32(device: torch.device) -> bool:
    """Whether this version of torch adds a product of half types to a float32 matrix in place; older ones refuse."""
    sum_MN, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=torch.float16)
    try:
        torch.addmm(sum_MN, ones, ones, out_dtype=torch.float32, out=sum_MN)
    except RuntimeError:
        return False
    return bool((sum_MN == 17).all())


def configurations() -> list[Configuration]:
    """The published vocabulary in the types that models train in, and a large one."""
    found = []
    for V, dtype, gradient in (
        (4096, "bf16", False),
        (4096, "bf16", True),
        (4096, "fp32", True),
        (16384, "bf16", True),
    ):
        block, warps = launch_options(V)
        options = dict(V=V, SMOOTHING=0.1, BIASED=True, WEIGHTED=True, GRADIENT=gradient, BLOCK=block)
        signature = {
            name: "constexpr" if name in options else "*fp32" if name.endswith("_ptr") else "i32"
            for name in row_kernel.arg_names
        } | {"logits_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}", "target_ptr": "*i64"}
        name = f"scale_cross_entropy row{' gradient' * gradient} V={V} {dtype}"
        found.append(Configuration(name, row_kernel, signature, options, warps))
    for dtype in ("bf16", "fp32"):
        signature = {
            "x_ptr": f"*{dtype}",
            "factor_ptr": "*fp32",
            "y_ptr": f"*{dtype}",
            "N": "i32",
            "BLOCK": "constexpr",
        }
        options = dict(BLOCK=SCALE_BLOCK)
        name = f"scale_cross_entropy scale {dtype}"
        found.append(Configuration(name, scale_kernel, signature, options, 8, divisible_by_16=("N",)))
    return found
