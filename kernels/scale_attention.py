"""scale_attention in Triton: attention under the block-causal mask of the scales, forward and backward.

A program owns a block of query rows (forward, dq) or of keys (dk, dv) and walks over the tiles of the other side that
the mask opens to it: closed tiles are not visited, open ones take no mask. Which rows a program owns and where its
walk turns from open to masked tiles stands in a small plan, made once per pyramid on the host: rows are cut at the
scales' ends wherever that saves tiles, and the longest blocks start first. Softmax runs in base 2, in float32, with
the running maximum subtracted. No atomics: the backward is two kernels, the same bits in every run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from var_fast.kernels.configuration import Configuration

HEAD_SIZES = (32, 64, 96, 128)
LOG2_E = 1.4426950408889634
PROGRAM_COST = 128
"""What a program's start and end cost, in keys or query rows that it could visit instead."""


class Options(NamedTuple):
    """Tiles, warps and pipeline stages of a launch. `rows`: what a program owns; `tile`: what it visits at a time, and
    `masked` where it needs the mask (narrow: less in registers, and less work behind the last key)."""

    rows: int
    tile: int
    masked: int
    warps: int
    stages: int


# ------------------------------------------------------------------------------------------------------------- plans
def query_plan(ends: Sequence[int], rows: int, tile: int, masked: int) -> list[tuple[int, int, int, int]]:
    """(begin, end, open, last) of each block of query rows [begin, end), the longest first: all of its rows see keys
    [0, open), a multiple of `tile`; some see keys [open, last)."""

    def limit(row):
        return ends[bisect_right(ends, row)]

    def entry(begin, end):
        return begin, end, limit(begin) // tile * tile, limit(end - 1)

    def work(begin, end):
        _, _, open_end, last = entry(begin, end)
        return open_end + triton.cdiv(last - open_end, masked) * masked

    return sorted((entry(*block) for block in _cut(ends, rows, work)), key=lambda e: (-work(*e[:2]), e[0]))


def key_plan(ends: Sequence[int], rows: int, tile: int, masked: int) -> list[tuple[int, int, int, int]]:
    """(begin, end, first, open) of each block of keys [begin, end), the longest first: query rows [first, open) see
    some of its keys; rows [open, L), in number a multiple of `tile`, see all of them."""
    L = ends[-1]

    def start(key):
        at = bisect_right(ends, key)
        return ends[at - 1] if at else 0

    def entry(begin, end):
        return begin, end, start(begin), L - (L - start(end - 1)) // tile * tile

    def work(begin, end):
        _, _, first, open_begin = entry(begin, end)
        return L - open_begin + triton.cdiv(open_begin - first, masked) * masked

    return sorted((entry(*block) for block in _cut(ends, rows, work)), key=lambda e: (-work(*e[:2]), e[0]))


def _cut(ends: Sequence[int], rows: int, work: Callable[[int, int], int]) -> list[tuple[int, int]]:
    """[0, L) in blocks of at most `rows`, cut at those ends of scales that make the sum of their work least."""
    cuts = sorted({0, *ends})
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for j in range(1, len(cuts)):
        candidates = []
        for i in range(j):
            blocks = [(begin, min(begin + rows, cuts[j])) for begin in range(cuts[i], cuts[j], rows)]
            cost = sum(work(*block) + PROGRAM_COST for block in blocks)
            candidates.append((best[i][0] + cost, best[i][1] + blocks))
        best.append(min(candidates, key=lambda candidate: candidate[0]))
    return best[-1][1]


@lru_cache(maxsize=256)
def _tables(kernel: str, ends: tuple[int, ...], options: Options, device: torch.device):
    """(ends, plan) of a kernel, int32 on the device: the ends of scales, filled up with L to a power of two; the plan
    as (number of blocks, 4)."""
    width = max(16, triton.next_power_of_2(len(ends)))
    plan = key_plan if kernel == "key_backward" else query_plan
    return (
        torch.tensor([*ends, *[ends[-1]] * (width - len(ends))], dtype=torch.int32, device=device),
        torch.tensor(plan(ends, options.rows, options.tile, options.masked), dtype=torch.int32, device=device),
    )


# ----------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _load(ptr, stride, first, end, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Rows [first, first + ROWS) of one head; zeros from `end` on if CHECK, and from channel D on."""
    rows = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    at = ptr + tl.cast(first, tl.int64) * stride + (rows * stride + d)
    if CHECK and D < BLOCK_D:
        return tl.load(at, (rows < end - first) & (d < D), 0.0)
    elif CHECK:
        return tl.load(at, rows < end - first, 0.0)
    elif D < BLOCK_D:
        return tl.load(at, d < D, 0.0)
    else:
        return tl.load(at)


@triton.jit
def _store(ptr, stride, first, end, tile, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    at = ptr + tl.cast(first, tl.int64) * stride + (rows * stride + d)
    tl.store(at, tile.to(ptr.dtype.element_ty), (rows < end - first) & (d < D))


@triton.jit
def _limits(ends_ptr, rows, L, ENDS: tl.constexpr):
    """Of each query row the end of its scale: it sees the keys before that."""
    ends = tl.load(ends_ptr + tl.arange(0, ENDS))[None, :]
    return tl.min(tl.where(ends > rows[:, None], ends, L), axis=1)


@triton.jit
def _starts(ends_ptr, keys, ENDS: tl.constexpr):
    """Of each key the begin of its scale: query rows from there on see it."""
    ends = tl.load(ends_ptr + tl.arange(0, ENDS))[None, :]
    return tl.max(tl.where(ends <= keys[:, None], ends, 0), axis=1)


@triton.jit
def _attend(
    acc, total, top, q, k_ptr, v_ptr, k_row, v_row, n, last, limits, scale,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running output, sum and maximum of the rows."""
    k = _load(k_ptr, k_row, n, last, N, D, BLOCK_D, MASK)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK:
        s = tl.where(tl.arange(0, N)[None, :] < (limits - n)[:, None], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, axis=1))
    p = tl.exp2(s * scale - (new_top * scale)[:, None])
    shrink = tl.exp2((top - new_top) * scale)
    total = total * shrink + tl.sum(p, axis=1)
    v = _load(v_ptr, v_row, n, last, N, D, BLOCK_D, MASK)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit(do_not_specialize=["L", "H", "blocks"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, ends_ptr, plan_ptr,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head,
    L, H, blocks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MASKED_N: tl.constexpr,
    ENDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # all blocks of one head run side by side: its keys and values stay in the L2 cache
    entry = plan_ptr + tl.program_id(0) % blocks * 4
    of_all = tl.program_id(0) // blocks
    image, head = (of_all // H).to(tl.int64), of_all % H
    begin, end, open_end, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    rows = begin + tl.arange(0, M)
    q = _load(q_ptr + image * q_image + head * q_head, q_row, begin, end, M, D, BLOCK_D, True)
    k_ptr += image * k_image + head * k_head
    v_ptr += image * v_image + head * v_head
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    for n in range(0, open_end, N):
        acc, total, top = _attend(
            acc, total, top, q, k_ptr, v_ptr, k_row, v_row, n, last, None, scale, N, D, BLOCK_D, False, PRECISION
        )
    limits = _limits(ends_ptr, rows, L, ENDS)
    for n in range(open_end, last, MASKED_N):
        acc, total, top = _attend(
            acc, total, top, q, k_ptr, v_ptr, k_row, v_row, n, last, limits, scale,
            MASKED_N, D, BLOCK_D, True, PRECISION,
        )  # fmt: skip
    tl.store(lse_ptr + of_all.to(tl.int64) * L + rows, top * scale + tl.log2(total), rows < end)
    _store(o_ptr + (image * L * H + head) * D, H * D, begin, end, acc / total[:, None], M, D, BLOCK_D)


@triton.jit
def _query_gradient(
    dq, q, do, lse, delta, k_ptr, v_ptr, k_row, v_row, n, last, limits, scale,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = _load(k_ptr, k_row, n, last, N, D, BLOCK_D, MASK)
    v = _load(v_ptr, v_row, n, last, N, D, BLOCK_D, MASK)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK:
        s = tl.where(tl.arange(0, N)[None, :] < (limits - n)[:, None], s, float("-inf"))
    p = tl.exp2(s * scale - lse[:, None])
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["L", "H", "blocks"])
def query_backward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, ends_ptr, plan_ptr,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head, do_image, do_row, do_head,
    L, H, blocks, scale, softmax_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MASKED_N: tl.constexpr,
    ENDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq; and delta = sum over channels of o do, which the key kernel reads too."""
    entry = plan_ptr + tl.program_id(0) % blocks * 4
    of_all = tl.program_id(0) // blocks
    image, head = (of_all // H).to(tl.int64), of_all % H
    begin, end, open_end, last = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    rows = begin + tl.arange(0, M)
    contiguous = (image * L * H + head) * D
    do = _load(do_ptr + image * do_image + head * do_head, do_row, begin, end, M, D, BLOCK_D, True)
    o = _load(o_ptr + contiguous, H * D, begin, end, M, D, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    at = of_all.to(tl.int64) * L + rows
    tl.store(delta_ptr + at, delta, rows < end)
    lse = tl.load(lse_ptr + at, rows < end, 0.0)
    q = _load(q_ptr + image * q_image + head * q_head, q_row, begin, end, M, D, BLOCK_D, True)
    k_ptr += image * k_image + head * k_head
    v_ptr += image * v_image + head * v_head
    dq = tl.zeros([M, BLOCK_D], tl.float32)
    for n in range(0, open_end, N):
        dq = _query_gradient(
            dq, q, do, lse, delta, k_ptr, v_ptr, k_row, v_row, n, last, None, scale, N, D, BLOCK_D, False, PRECISION
        )
    limits = _limits(ends_ptr, rows, L, ENDS)
    for n in range(open_end, last, MASKED_N):
        dq = _query_gradient(
            dq, q, do, lse, delta, k_ptr, v_ptr, k_row, v_row, n, last, limits, scale,
            MASKED_N, D, BLOCK_D, True, PRECISION,
        )  # fmt: skip
    _store(dq_ptr + contiguous, H * D, begin, end, dq * softmax_scale, M, D, BLOCK_D)


@triton.jit
def _key_gradient(
    dk, dv, k, v, q_ptr, do_ptr, q_row, do_row, lse_ptr, delta_ptr, m, end, starts, scale,
    M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of query rows into dk and dv. Keys are the rows of the products: scores stand as (key, query)."""
    rows = m + tl.arange(0, M)
    q = _load(q_ptr, q_row, m, end, M, D, BLOCK_D, MASK)
    do = _load(do_ptr, do_row, m, end, M, D, BLOCK_D, MASK)
    if MASK:
        lse = tl.load(lse_ptr + rows, rows < end, 0.0)
        delta = tl.load(delta_ptr + rows, rows < end, 0.0)
    else:
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if MASK:
        s = tl.where(tl.arange(0, M)[None, :] >= (starts - m)[:, None], s, float("-inf"))
    p = tl.exp2(s * scale - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["L", "H", "blocks"])
def key_backward_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, ends_ptr, plan_ptr,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head, do_image, do_row, do_head,
    L, H, blocks, scale, softmax_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MASKED_M: tl.constexpr,
    ENDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    entry = plan_ptr + tl.program_id(0) % blocks * 4
    of_all = tl.program_id(0) // blocks
    image, head = (of_all // H).to(tl.int64), of_all % H
    begin, end, first, open_begin = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    k = _load(k_ptr + image * k_image + head * k_head, k_row, begin, end, N, D, BLOCK_D, True)
    v = _load(v_ptr + image * v_image + head * v_head, v_row, begin, end, N, D, BLOCK_D, True)
    q_ptr += image * q_image + head * q_head
    do_ptr += image * do_image + head * do_head
    lse_ptr += of_all.to(tl.int64) * L
    delta_ptr += of_all.to(tl.int64) * L
    dk = tl.zeros([N, BLOCK_D], tl.float32)
    dv = tl.zeros([N, BLOCK_D], tl.float32)
    starts = _starts(ends_ptr, begin + tl.arange(0, N), ENDS)
    for m in range(first, open_begin, MASKED_M):
        dk, dv = _key_gradient(
            dk, dv, k, v, q_ptr, do_ptr, q_row, do_row, lse_ptr, delta_ptr, m, open_begin, starts, scale,
            MASKED_M, D, BLOCK_D, True, PRECISION,
        )  # fmt: skip
    for m in range(open_begin, L, M):
        dk, dv = _key_gradient(
            dk, dv, k, v, q_ptr, do_ptr, q_row, do_row, lse_ptr, delta_ptr, m, L, None, scale,
            M, D, BLOCK_D, False, PRECISION,
        )  # fmt: skip
    contiguous = (image * L * H + head) * D
    _store(dk_ptr + contiguous, H * D, begin, end, dk * softmax_scale, N, D, BLOCK_D)
    _store(dv_ptr + contiguous, H * D, begin, end, dv, N, D, BLOCK_D)


# ---------------------------------------------------------------------------------------------------------- launches
# (kernel, architecture) -> {channels up to: Options}. None of them spills; those of architecture 80, which serve
# consumer cards too, take less than 99 KB of shared memory. Of 90, those of 64 channels were the fastest of some thirty
# on an H100; the others are not measured.
HALF = {
    ("forward", 80): {32: Options(128, 64, 64, 4, 3), 64: Options(128, 64, 32, 4, 3), 128: Options(128, 64, 32, 8, 3)},
    ("forward", 90): {32: Options(128, 64, 64, 4, 3), 64: Options(64, 64, 32, 4, 3), 128: Options(128, 64, 64, 8, 3)},
    ("forward", 100): {64: Options(128, 64, 64, 4, 3), 128: Options(128, 64, 64, 8, 3)},
    ("query_backward", 80): {64: Options(64, 64, 32, 4, 3), 128: Options(64, 64, 64, 8, 2)},
    ("query_backward", 90): {64: Options(64, 64, 64, 4, 3), 128: Options(128, 64, 64, 8, 2)},
    ("query_backward", 100): {64: Options(128, 64, 64, 8, 3), 128: Options(128, 64, 64, 8, 2)},
    ("key_backward", 80): {64: Options(64, 32, 32, 4, 2), 128: Options(64, 32, 32, 4, 2)},
    ("key_backward", 90): {64: Options(64, 32, 32, 4, 4), 128: Options(128, 32, 32, 8, 2)},
    ("key_backward", 100): {64: Options(128, 64, 64, 8, 3), 128: Options(128, 32, 32, 8, 2)},
}
FLOAT32 = {
    ("forward", "ieee"): {64: Options(64, 32, 32, 8, 2), 128: Options(32, 32, 32, 8, 1)},
    ("query_backward", "ieee"): {64: Options(64, 32, 32, 8, 2), 128: Options(32, 32, 32, 8, 2)},
    ("key_backward", "ieee"): {64: Options(32, 32, 32, 8, 1), 128: Options(32, 16, 16, 8, 1)},
    ("forward", "tf32"): {64: Options(64, 32, 32, 4, 2), 128: Options(64, 32, 32, 8, 2)},
    ("query_backward", "tf32"): {64: Options(64, 32, 32, 4, 2), 128: Options(64, 16, 16, 8, 2)},
    ("key_backward", "tf32"): {64: Options(64, 32, 32, 8, 2), 128: Options(32, 32, 32, 8, 2)},
}


def launch_options(kernel: str, D: int, half: bool, precision: str, architecture: int) -> Options:
    """`kernel`: "forward", "query_backward" or "key_backward"; `precision`: of float32 products, "ieee" or "tf32";
    `architecture`: 80, 90 or 100."""
    by_channels = HALF[kernel, architecture] if half else FLOAT32[kernel, precision]
    return by_channels[min(most for most in by_channels if D <= most)]


def _architecture(device: torch.device) -> int:
    """The nearest of those with options of their own; consumer cards (8.6, 8.9, 12.0) have A100's instructions."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: 90, 10: 100}.get(major, 80)


class _Launch(NamedTuple):
    options: Options
    ends: torch.Tensor
    plan: torch.Tensor
    grid: tuple[int]
    constexprs: dict


def _prepare(kernel: str, x_BLHD: torch.Tensor, ends: Sequence[int]) -> _Launch:
    B, L, H, D = x_BLHD.shape
    half = x_BLHD.element_size() == 2
    precision = "tf32" if not half and torch.backends.cuda.matmul.allow_tf32 else "ieee"
    options = launch_options(kernel, D, half, precision, _architecture(x_BLHD.device))
    ends_S, plan_N4 = _tables(kernel, tuple(ends), options, x_BLHD.device)
    constexprs = dict(
        D=D, BLOCK_D=triton.next_power_of_2(D), ENDS=len(ends_S), PRECISION=precision,
        num_warps=options.warps, num_stages=options.stages,
    )  # fmt: skip
    return _Launch(options, ends_S, plan_N4, (len(plan_N4) * B * H,), constexprs)


def _rows(x_BLHD: torch.Tensor) -> torch.Tensor:
    """As it is, whatever its strides, if the channels of a head lie side by side."""
    return x_BLHD if x_BLHD.stride(-1) == 1 else x_BLHD.contiguous()


def forward(q_BLHD, k_BLHD, v_BLHD, ends, softmax_scale):
    """(o (B, L, H, D), lse (B, H, L)): lse, float32, is the logarithm to base 2 of the softmax's denominator.

    `ends`: where each scale ends, the last of them L.
    """
    q_BLHD, k_BLHD, v_BLHD = _rows(q_BLHD), _rows(k_BLHD), _rows(v_BLHD)
    B, L, H, _ = q_BLHD.shape
    o_BLHD = torch.empty_like(q_BLHD, memory_format=torch.contiguous_format)
    lse_BHL = q_BLHD.new_empty(B, H, L, dtype=torch.float32)
    if o_BLHD.numel():
        launch = _prepare("forward", q_BLHD, ends)
        forward_kernel[launch.grid](
            q_BLHD, k_BLHD, v_BLHD, o_BLHD, lse_BHL, launch.ends, launch.plan,
            *q_BLHD.stride()[:3], *k_BLHD.stride()[:3], *v_BLHD.stride()[:3],
            L, H, len(launch.plan), softmax_scale * LOG2_E,
            M=launch.options.rows, N=launch.options.tile, MASKED_N=launch.options.masked, **launch.constexprs,
        )  # fmt: skip
    return o_BLHD, lse_BHL


def backward(do_BLHD, q_BLHD, k_BLHD, v_BLHD, o_BLHD, lse_BHL, ends, softmax_scale):
    """(dq, dk, dv), each (B, L, H, D) contiguous; `o_BLHD` and `lse_BHL` are the forward's."""
    do_BLHD, q_BLHD, k_BLHD, v_BLHD = _rows(do_BLHD), _rows(q_BLHD), _rows(k_BLHD), _rows(v_BLHD)
    o_BLHD = o_BLHD.contiguous()
    _, L, H, _ = q_BLHD.shape
    dq_BLHD, dk_BLHD, dv_BLHD = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BLHD, k_BLHD, v_BLHD)
    )
    if not dq_BLHD.numel():
        return dq_BLHD, dk_BLHD, dv_BLHD
    delta_BHL = torch.empty_like(lse_BHL)
    strides = [stride for x in (q_BLHD, k_BLHD, v_BLHD, do_BLHD) for stride in x.stride()[:3]]
    launch = _prepare("query_backward", q_BLHD, ends)
    query_backward_kernel[launch.grid](
        q_BLHD, k_BLHD, v_BLHD, o_BLHD, do_BLHD, dq_BLHD, lse_BHL, delta_BHL, launch.ends, launch.plan,
        *strides, L, H, len(launch.plan), softmax_scale * LOG2_E, softmax_scale,
        M=launch.options.rows, N=launch.options.tile, MASKED_N=launch.options.masked, **launch.constexprs,
    )  # fmt: skip
    launch = _prepare("key_backward", q_BLHD, ends)
    key_backward_kernel[launch.grid](
        q_BLHD, k_BLHD, v_BLHD, do_BLHD, dk_BLHD, dv_BLHD, lse_BHL, delta_BHL, launch.ends, launch.plan,
        *strides, L, H, len(launch.plan), softmax_scale * LOG2_E, softmax_scale,
        N=launch.options.rows, M=launch.options.tile, MASKED_M=launch.options.masked, **launch.constexprs,
    )  # fmt: skip
    return dq_BLHD, dk_BLHD, dv_BLHD


def configurations() -> list[Configuration]:
    """Half precision with every head size; float32 with the two that the options tell apart."""
    cases = [("bf16", "ieee", D, target) for D in HEAD_SIZES for target in (80, 90, 100)]
    cases += [("fp32", "tf32", D, target) for D in (64, 128) for target in (80, 90, 100)]
    # no tensor cores in these, so the architectures hardly differ
    cases += [("fp32", "ieee", D, 90) for D in (64, 128)]
    return [_configuration(kernel, *case) for case in cases for kernel in KERNELS]


KERNELS = {"forward": forward_kernel, "query_backward": query_backward_kernel, "key_backward": key_backward_kernel}


def _configuration(name: str, dtype: str, precision: str, D: int, architecture: int) -> Configuration:
    kernel = KERNELS[name]
    options = launch_options(name, D, dtype == "bf16", precision, architecture)
    own, other = ("N", "M") if name == "key_backward" else ("M", "N")
    constexprs = dict(D=D, BLOCK_D=triton.next_power_of_2(D), ENDS=16, PRECISION=precision)
    constexprs |= {own: options.rows, other: options.tile, f"MASKED_{other}": options.masked}
    kinds = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "ends_ptr": "*i32", "plan_ptr": "*i32"}
    kinds |= {"scale": "fp32", "softmax_scale": "fp32"} | dict.fromkeys(constexprs, "constexpr")
    signature = {
        argument: kinds.get(argument) or (f"*{dtype}" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    return Configuration(
        f"scale_attention {name} {'bf16' if dtype == 'bf16' else precision} D={D} for sm_{architecture}",
        kernel,
        signature,
        constexprs,
        options.warps,
        options.stages,
        matrix=precision == "tf32" or dtype == "bf16",
        divisible_by_16=tuple(name for name in kernel.arg_names if name.endswith(("_image", "_row", "_head"))),
        targets=(architecture,),
    )
