"""adaln_modulate and residual_adaln_modulate in Triton: one pass over the activations forward, one backward.

A program has a few whole rows in registers, so mean and variance are exact two-pass statistics in float32 from data
read once. The backward recomputes them from x, which it reads anyway. Gradients of what is per image are summed by a
program over its share of the image's rows, and over the shares in a second, ordered sum: no atomics, the same bits in
every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from var_fast.kernels.configuration import Configuration

TILE = 1024
"""Elements of x that a program holds at a time, if a row is no longer: many small programs keep the memory busy."""
SHARES = 528
"""Programs of a backward launch, about: four for each multiprocessor of an H100 or H200."""


@triton.jit
def _normalise(x, inside, C, eps, BLOCK_C: tl.constexpr):
    """(x - mean) / deviation of rows (ROWS, BLOCK_C) in float32, and 1 / deviation; 0 outside."""
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / C + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def _tile(image, begin, end, L, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where rows [begin, begin + ROWS) of an image are, and which elements are there, before row `end`."""
    rows = begin + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    return (image.to(tl.int64) * L + rows)[:, None] * C + c[None, :], (rows < end)[:, None] & (c < C)[None, :]


@triton.jit
def forward_kernel(
    x_ptr, branch_ptr, gate_ptr, scale_ptr, shift_ptr, sum_ptr, y_ptr,
    L, C, gate_stride, scale_stride, shift_stride, eps,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    at, inside = _tile(image, tl.program_id(0) * ROWS, L, L, C, ROWS, BLOCK_C)
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    if RESIDUAL:
        gate = tl.load(gate_ptr + image * gate_stride + c, c < C, 0.0).to(tl.float32)
        x += tl.load(branch_ptr + at, inside, 0.0).to(tl.float32) * gate[None, :]
        # the norm sees what the next block will read back
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, x, inside)
        x = x.to(tl.float32)
    normed, _ = _normalise(x, inside, C, eps, BLOCK_C)
    scale = tl.load(scale_ptr + image * scale_stride + c, c < C, 0.0).to(tl.float32)
    shift = tl.load(shift_ptr + image * shift_stride + c, c < C, 0.0).to(tl.float32)
    tl.store(y_ptr + at, (normed * (1.0 + scale)[None, :] + shift[None, :]).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    dy_ptr, dsum_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr,
    dx_ptr, dbranch_ptr, dgate_ptr, dscale_ptr, dshift_ptr,
    L, C, gate_stride, scale_stride, eps, rows_per_share,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    share, image = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    dscale = tl.zeros([BLOCK_C], tl.float32)
    dshift = tl.zeros([BLOCK_C], tl.float32)
    if RESIDUAL:
        dgate = tl.zeros([BLOCK_C], tl.float32)
    first = share * rows_per_share
    end = tl.minimum(first + rows_per_share, L)
    if AHEAD:
        at, inside = _tile(image, first, end, L, C, ROWS, BLOCK_C)
        next_x, next_dy = tl.load(x_ptr + at, inside, 0.0), tl.load(dy_ptr + at, inside, 0.0)
        if RESIDUAL:
            next_dsum, next_branch = tl.load(dsum_ptr + at, inside, 0.0), tl.load(branch_ptr + at, inside, 0.0)
    for begin in range(first, end, ROWS):
        this_at, this_inside = _tile(image, begin, end, L, C, ROWS, BLOCK_C)
        if AHEAD:
            x, dy = next_x.to(tl.float32), next_dy.to(tl.float32)
            if RESIDUAL:
                dsum, branch = next_dsum.to(tl.float32), next_branch.to(tl.float32)
            # the next tile is on its way while this one is reduced
            at, inside = _tile(image, begin + ROWS, end, L, C, ROWS, BLOCK_C)
            next_x, next_dy = tl.load(x_ptr + at, inside, 0.0), tl.load(dy_ptr + at, inside, 0.0)
            if RESIDUAL:
                next_dsum, next_branch = tl.load(dsum_ptr + at, inside, 0.0), tl.load(branch_ptr + at, inside, 0.0)
        else:
            x = tl.load(x_ptr + this_at, this_inside, 0.0).to(tl.float32)
            dy = tl.load(dy_ptr + this_at, this_inside, 0.0).to(tl.float32)
        normed, rstd = _normalise(x, this_inside, C, eps, BLOCK_C)
        dscale += tl.sum(dy * normed, axis=0)
        dshift += tl.sum(dy, axis=0)
        # loaded for every tile, from the cache: kept, they would take the registers that wide rows need
        scale = tl.load(scale_ptr + image * scale_stride + c, c < C, 0.0).to(tl.float32)
        g = dy * (1.0 + scale)[None, :]
        mean_g = tl.sum(g, axis=1) / C
        mean_gn = tl.sum(g * normed, axis=1) / C
        dx = (g - mean_g[:, None] - normed * mean_gn[:, None]) * rstd[:, None]
        if RESIDUAL:
            if not AHEAD:
                dsum = tl.load(dsum_ptr + this_at, this_inside, 0.0).to(tl.float32)
                branch = tl.load(branch_ptr + this_at, this_inside, 0.0).to(tl.float32)
            dx += dsum
            dgate += tl.sum(dx * branch, axis=0)
            gate = tl.load(gate_ptr + image * gate_stride + c, c < C, 0.0).to(tl.float32)
            tl.store(dbranch_ptr + this_at, (dx * gate[None, :]).to(dbranch_ptr.dtype.element_ty), this_inside)
        tl.store(dx_ptr + this_at, dx.to(dx_ptr.dtype.element_ty), this_inside)
    to = (image * tl.num_programs(0) + share).to(tl.int64) * C + c
    tl.store(dscale_ptr + to, dscale, c < C)
    tl.store(dshift_ptr + to, dshift, c < C)
    if RESIDUAL:
        tl.store(dgate_ptr + to, dgate, c < C)


def launch_options(C: int, backward: bool = False) -> tuple[int, int, int]:
    """(rows, channels, warps) of a program's tile. The backward holds several times as much, so more warps share it."""
    block_c = triton.next_power_of_2(C)
    rows = max(1, TILE // block_c)
    elements = rows * block_c
    return rows, block_c, max(4, min(8, elements // 512)) if backward else max(1, elements // 512)


def loads_ahead(block_c: int) -> bool:
    """Whether the backward has the registers to load a tile before it needs it."""
    return block_c <= 4096


def forward(x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, eps):
    """(x', y) of residual_adaln_modulate; without `branch_BLC` (None) x' is None."""
    x_BLC = x_BLC.contiguous()
    B, L, C = x_BLC.shape
    residual = branch_BLC is not None
    y_BLC = torch.empty_like(x_BLC)
    sum_BLC = torch.empty_like(x_BLC) if residual else y_BLC
    branch_BLC = branch_BLC.contiguous() if residual else x_BLC
    gate_BC = _channels_last(gate_BC) if residual else scale_BC
    scale_BC, shift_BC = _channels_last(scale_BC), _channels_last(shift_BC)
    rows, block_c, warps = launch_options(C)
    if x_BLC.numel():
        forward_kernel[(triton.cdiv(L, rows), B)](
            x_BLC, branch_BLC, gate_BC, scale_BC, shift_BC, sum_BLC, y_BLC,
            L, C, gate_BC.stride(0), scale_BC.stride(0), shift_BC.stride(0), eps,
            RESIDUAL=residual, ROWS=rows, BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip
    return (sum_BLC if residual else None), y_BLC


def backward(dy_BLC, dsum_BLC, x_BLC, branch_BLC, gate_BC, scale_BC, eps):
    """(dx, dbranch, dgate, dscale, dshift); `x_BLC` is x' of the forward. Without `branch_BLC` (None) the second and
    third are None."""
    dy_BLC, x_BLC = dy_BLC.contiguous(), x_BLC.contiguous()
    B, L, C = x_BLC.shape
    residual = branch_BLC is not None
    dx_BLC = torch.empty_like(x_BLC)
    dbranch_BLC = torch.empty_like(branch_BLC, memory_format=torch.contiguous_format) if residual else dx_BLC
    branch_BLC = branch_BLC.contiguous() if residual else x_BLC
    dsum_BLC = dsum_BLC.contiguous() if residual else dy_BLC
    scale_BC = _channels_last(scale_BC)
    gate_BC = _channels_last(gate_BC) if residual else scale_BC
    rows, block_c, warps = launch_options(C, backward=True)
    shares = min(triton.cdiv(L, rows), max(1, SHARES // max(B, 1)))
    rows_per_share = triton.cdiv(triton.cdiv(L, shares), rows) * rows
    shares = triton.cdiv(L, rows_per_share)
    parts_3BSC = x_BLC.new_zeros(3 if residual else 2, B, shares, C, dtype=torch.float32)
    if x_BLC.numel():
        backward_kernel[(shares, B)](
            dy_BLC, dsum_BLC, x_BLC, branch_BLC, gate_BC, scale_BC,
            dx_BLC, dbranch_BLC, parts_3BSC[-1], parts_3BSC[0], parts_3BSC[1],
            L, C, gate_BC.stride(0), scale_BC.stride(0), eps, rows_per_share,
            RESIDUAL=residual, ROWS=rows, BLOCK_C=block_c, AHEAD=loads_ahead(block_c), num_warps=warps,
        )  # fmt: skip
    # one sum for each: results of an operator may not share memory
    dscale_BC, dshift_BC = parts_3BSC[0].sum(1), parts_3BSC[1].sum(1)
    if not residual:
        return dx_BLC, None, None, dscale_BC, dshift_BC
    return dx_BLC, dbranch_BLC, parts_3BSC[2].sum(1), dscale_BC, dshift_BC


def _channels_last(per_image_BC: torch.Tensor) -> torch.Tensor:
    """As it is if its channels lie side by side, as those of a chunk of a projection do."""
    return per_image_BC if per_image_BC.stride(-1) == 1 else per_image_BC.contiguous()


def configurations() -> list[Configuration]:
    """What the models of 16 to 36 blocks launch in bfloat16."""
    found = []
    for C in (1024, 1920, 2304, 4608):
        for residual in (False, True):
            for kernel in (forward_kernel, backward_kernel):
                rows, block_c, warps = launch_options(C, backward=kernel is backward_kernel)
                options = dict(RESIDUAL=residual, ROWS=rows, BLOCK_C=block_c)
                if kernel is backward_kernel:
                    options["AHEAD"] = loads_ahead(block_c)
                partial = ("dgate_ptr", "dscale_ptr", "dshift_ptr")
                signature = {
                    name: "constexpr"
                    if name in options
                    else "fp32"
                    if name == "eps"
                    else "*fp32"
                    if name in partial
                    else "*bf16"
                    if name.endswith("_ptr")
                    else "i32"
                    for name in kernel.arg_names
                }
                name = f"{'residual_' * residual}adaln_modulate {kernel.__name__.removesuffix('_kernel')} C={C}"
                even = ("C", "gate_stride", "scale_stride", "shift_stride")
                found.append(Configuration(name, kernel, signature, options, warps, divisible_by_16=even))
    return found
