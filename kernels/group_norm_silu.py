"""group_norm_silu in Triton: statistics of each (image, group), then norm, affine and SiLU; the backward likewise.

A group spans far more than a program can hold, so each direction takes two passes over the activations with a small sum
between them: a pass leaves, per run of pixels and channel, its share of the sums; one program per (image, group) adds
the shares in order and spreads the result over the group's channels; the second pass uses it. With N the bytes of x:
3 N forward (x twice in, y out), 5 N backward (x and dy twice in, dx out). The second pass begins with the images that
the first ended with, of which the cache still holds some. There are no atomics, and what a program does is independent
of the number of images: the same bits in every run and, but for dweight and dbias, in every batch.

Channels-last tensors and contiguous ones are read as they are: one kernel text with two addressings.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from var_fast.kernels.configuration import Configuration

SUM_TILE = 2048
"""Elements that a program of a first pass adds at a time, each with running sums of its own."""
TILE = 4096
"""Elements of a program of the forward's second pass; half of it in the backward's, which holds x and dy."""


@triton.jit
def _place(P, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """(run of pixels, channels (BLOCK_C,), strides of pixel and channel) of a program on axis 0."""
    run = tl.program_id(0) // ((C + BLOCK_C - 1) // BLOCK_C)
    c = tl.program_id(0) % ((C + BLOCK_C - 1) // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    if CHANNELS_LAST:
        return run, c, C, 1
    else:
        return run, c, 1, P


@triton.jit
def statistics_kernel(
    x_ptr, share_ptr, P, run_pixels, run_count,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean of each channel over a run of pixels, and the sum of squared distances from it: share (image, run, 2, C).

    Sums are taken of x less the mean of the run's first tile: with t tiles in a run, the sum of squares about that
    mean is at most t times the one about the run's own mean, so little is lost when the one is taken from the other.
    """
    run, c, p_stride, c_stride = _place(P, C, CHANNELS_LAST, BLOCK_C)
    image = tl.program_id(1)
    x_ptr += image.to(tl.int64) * C * P
    first = run * run_pixels
    end = tl.minimum(first + run_pixels, P)
    p = first + tl.arange(0, BLOCK_P)
    inside = (p < end)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + p[:, None] * p_stride + c[None, :] * c_stride, inside, 0.0).to(tl.float32)
    centre = tl.sum(x, axis=0) / tl.minimum(end - first, BLOCK_P)
    sums = tl.where(inside, x - centre[None, :], 0.0)
    squares = sums * sums
    for begin in tl.range(first + BLOCK_P, end, BLOCK_P, num_stages=3):
        p = begin + tl.arange(0, BLOCK_P)
        inside = (p < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + p[:, None] * p_stride + c[None, :] * c_stride, inside, 0.0).to(tl.float32)
        x = tl.where(inside, x - centre[None, :], 0.0)
        sums += x
        squares += x * x
    count = (end - first).to(tl.float32)
    offset = tl.sum(sums, axis=0) / count
    spread = tl.maximum(tl.sum(squares, axis=0) - count * offset * offset, 0.0)
    to = (image * run_count + run).to(tl.int64) * (2 * C) + c
    tl.store(share_ptr + to, centre + offset, c < C)
    tl.store(share_ptr + to + C, spread, c < C)


@triton.jit
def combine_statistics_kernel(
    share_ptr, mean_ptr, rstd_ptr, P, run_pixels, run_count, eps,
    C: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_RUNS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / deviation of a group, at each of its channels: first the mean, then the squares about it."""
    image = tl.program_id(1)
    in_group = tl.arange(0, BLOCK_G)
    c = tl.program_id(0) * PER_GROUP + in_group
    share_ptr += image.to(tl.int64) * run_count * (2 * C)
    total = tl.zeros([BLOCK_RUNS, BLOCK_G], tl.float32)
    for begin in range(0, run_count, BLOCK_RUNS):
        run = begin + tl.arange(0, BLOCK_RUNS)
        inside = (run < run_count)[:, None] & (in_group < PER_GROUP)[None, :]
        count = tl.minimum(P - run * run_pixels, run_pixels).to(tl.float32)[:, None]
        total += count * tl.load(share_ptr + run[:, None] * (2 * C) + c[None, :], inside, 0.0)
    size = P * 1.0 * PER_GROUP
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / size
    total = tl.zeros([BLOCK_RUNS, BLOCK_G], tl.float32)
    for begin in range(0, run_count, BLOCK_RUNS):
        run = begin + tl.arange(0, BLOCK_RUNS)
        inside = (run < run_count)[:, None] & (in_group < PER_GROUP)[None, :]
        count = tl.minimum(P - run * run_pixels, run_pixels).to(tl.float32)[:, None]
        at = run[:, None] * (2 * C) + c[None, :]
        away = tl.load(share_ptr + at, inside, 0.0) - mean
        total += tl.where(inside, tl.load(share_ptr + at + C, inside, 0.0) + count * away * away, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(total, axis=1), axis=0) / size + eps)
    tl.store(mean_ptr + image * C + c, tl.zeros([BLOCK_G], tl.float32) + mean, in_group < PER_GROUP)
    tl.store(rstd_ptr + image * C + c, tl.zeros([BLOCK_G], tl.float32) + rstd, in_group < PER_GROUP)


@triton.jit
def apply_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, P,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, c, p_stride, c_stride = _place(P, C, CHANNELS_LAST, BLOCK_C)
    image = tl.num_programs(1) - 1 - tl.program_id(1)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (p < P)[:, None] & (c < C)[None, :]
    at = p[:, None] * p_stride + c[None, :] * c_stride
    x = tl.load(x_ptr + image.to(tl.int64) * C * P + at, inside, 0.0).to(tl.float32)
    mean = tl.load(mean_ptr + image * C + c, c < C, 0.0)
    weight = tl.load(weight_ptr + c, c < C, 0.0).to(tl.float32) * tl.load(rstd_ptr + image * C + c, c < C, 0.0)
    bias = tl.load(bias_ptr + c, c < C, 0.0).to(tl.float32)
    z = (x - mean[None, :]) * weight[None, :] + bias[None, :]
    y = z * tl.sigmoid(z)
    tl.store(y_ptr + image.to(tl.int64) * C * P + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _before_silu(x, dy, mean, rstd, weight, bias):
    """(normed, gradient at the normed and affine value) of tiles (BLOCK_P, BLOCK_C)."""
    normed = (x - mean[None, :]) * rstd[None, :]
    z = normed * weight[None, :] + bias[None, :]
    gate = tl.sigmoid(z)
    return normed, dy * gate * (1.0 + z * (1.0 - gate))


@triton.jit
def gradient_sums_kernel(
    x_ptr, dy_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, share_ptr, P, run_pixels, run_count,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a run of pixels of g and g * normed, g the gradient before SiLU: share (image, run, 2, C)."""
    run, c, p_stride, c_stride = _place(P, C, CHANNELS_LAST, BLOCK_C)
    image = tl.program_id(1)
    x_ptr += image.to(tl.int64) * C * P
    dy_ptr += image.to(tl.int64) * C * P
    mean = tl.load(mean_ptr + image * C + c, c < C, 0.0)
    rstd = tl.load(rstd_ptr + image * C + c, c < C, 0.0)
    weight = tl.load(weight_ptr + c, c < C, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, c < C, 0.0).to(tl.float32)
    first = run * run_pixels
    end = tl.minimum(first + run_pixels, P)
    dbias = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    dweight = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for begin in tl.range(first, end, BLOCK_P, num_stages=3):
        p = begin + tl.arange(0, BLOCK_P)
        inside = (p < end)[:, None] & (c < C)[None, :]
        at = p[:, None] * p_stride + c[None, :] * c_stride
        x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, inside, 0.0).to(tl.float32)  # 0 outside, and so is what it gives
        normed, g = _before_silu(x, dy, mean, rstd, weight, bias)
        dbias += g
        dweight += g * normed
    to = (image * run_count + run).to(tl.int64) * (2 * C) + c
    tl.store(share_ptr + to, tl.sum(dbias, axis=0), c < C)
    tl.store(share_ptr + to + C, tl.sum(dweight, axis=0), c < C)


@triton.jit
def combine_gradients_kernel(
    share_ptr, weight_ptr, dbias_ptr, dweight_ptr, mean_g_ptr, mean_gn_ptr, P, run_count,
    C: tl.constexpr, PER_GROUP: tl.constexpr, BLOCK_RUNS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Per image: dbias and dweight; and the group's means of weight * g and weight * g * normed, at each channel."""
    image = tl.program_id(1)
    in_group = tl.arange(0, BLOCK_G)
    c = tl.program_id(0) * PER_GROUP + in_group
    share_ptr += image.to(tl.int64) * run_count * (2 * C)
    dbias = tl.zeros([BLOCK_RUNS, BLOCK_G], tl.float32)
    dweight = tl.zeros([BLOCK_RUNS, BLOCK_G], tl.float32)
    for begin in range(0, run_count, BLOCK_RUNS):
        run = begin + tl.arange(0, BLOCK_RUNS)
        inside = (run < run_count)[:, None] & (in_group < PER_GROUP)[None, :]
        at = run[:, None] * (2 * C) + c[None, :]
        dbias += tl.load(share_ptr + at, inside, 0.0)
        dweight += tl.load(share_ptr + at + C, inside, 0.0)
    dbias, dweight = tl.sum(dbias, axis=0), tl.sum(dweight, axis=0)
    weight = tl.load(weight_ptr + c, in_group < PER_GROUP, 0.0).to(tl.float32)
    size = P * 1.0 * PER_GROUP
    mean_g = tl.sum(weight * dbias, axis=0) / size
    mean_gn = tl.sum(weight * dweight, axis=0) / size
    tl.store(dbias_ptr + image * C + c, dbias, in_group < PER_GROUP)
    tl.store(dweight_ptr + image * C + c, dweight, in_group < PER_GROUP)
    tl.store(mean_g_ptr + image * C + c, tl.zeros([BLOCK_G], tl.float32) + mean_g, in_group < PER_GROUP)
    tl.store(mean_gn_ptr + image * C + c, tl.zeros([BLOCK_G], tl.float32) + mean_gn, in_group < PER_GROUP)


@triton.jit
def gradient_kernel(
    x_ptr, dy_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, mean_g_ptr, mean_gn_ptr, dx_ptr, P,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd (weight g - mean(weight g) - normed mean(weight g normed)), the means over the group."""
    tile, c, p_stride, c_stride = _place(P, C, CHANNELS_LAST, BLOCK_C)
    image = tl.num_programs(1) - 1 - tl.program_id(1)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (p < P)[:, None] & (c < C)[None, :]
    at = p[:, None] * p_stride + c[None, :] * c_stride
    x = tl.load(x_ptr + image.to(tl.int64) * C * P + at, inside, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + image.to(tl.int64) * C * P + at, inside, 0.0).to(tl.float32)
    mean = tl.load(mean_ptr + image * C + c, c < C, 0.0)
    rstd = tl.load(rstd_ptr + image * C + c, c < C, 0.0)
    weight = tl.load(weight_ptr + c, c < C, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, c < C, 0.0).to(tl.float32)
    mean_g = tl.load(mean_g_ptr + image * C + c, c < C, 0.0)
    mean_gn = tl.load(mean_gn_ptr + image * C + c, c < C, 0.0)
    normed, g = _before_silu(x, dy, mean, rstd, weight, bias)
    dx = (weight[None, :] * g - mean_g[None, :] - normed * mean_gn[None, :]) * rstd[None, :]
    tl.store(dx_ptr + image.to(tl.int64) * C * P + at, dx.to(dx_ptr.dtype.element_ty), inside)


def memory_format(x_BChw: torch.Tensor) -> torch.memory_format:
    """What the result is in and x is read in; x is copied into it first where its elements lie otherwise."""
    channels_last = x_BChw.dim() == 4 and x_BChw.stride(1) == 1 and not x_BChw.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def launch_options(elements: int, C: int, P: int, channels_last: bool) -> dict[str, int]:
    """A tile of `elements`: whole channels side by side, or whole runs of pixels, as x lies in memory.

    Its channels divide C where C is a multiple of 32, as in all models, so that no thread idles.
    """
    if channels_last:
        block_c = min(C & -C, 64) if C % 32 == 0 else min(triton.next_power_of_2(C), 64)
        block_p = elements // block_c
    else:
        block_p = min(triton.next_power_of_2(P), 256)
        block_c = min(triton.next_power_of_2(C), elements // block_p)
    return dict(C=C, CHANNELS_LAST=channels_last, BLOCK_P=block_p, BLOCK_C=block_c)


def combine_options(C: int, groups: int) -> dict[str, int]:
    block_g = triton.next_power_of_2(C // groups)
    return dict(C=C, PER_GROUP=C // groups, BLOCK_RUNS=max(1, 1024 // block_g), BLOCK_G=block_g)


def run_length(P: int, options: dict[str, int]) -> int:
    """Pixels of a program of a first pass: 4 to 16 tiles, about 512 programs an image before that."""
    blocks = triton.cdiv(options["C"], options["BLOCK_C"])
    tiles = triton.cdiv(P, options["BLOCK_P"]) * blocks // 512
    return min(max(tiles, 4), 16) * options["BLOCK_P"]


def forward(x_BChw, weight_C, bias_C, groups, eps):
    """(y, mean_BC, rstd_BC): the statistics in float32, those of a group at each of its channels."""
    format = memory_format(x_BChw)
    x_BChw, weight_C, bias_C = x_BChw.contiguous(memory_format=format), weight_C.contiguous(), bias_C.contiguous()
    B, C = x_BChw.shape[:2]
    y_BChw = torch.empty_like(x_BChw, memory_format=format)
    mean_BC, rstd_BC = (x_BChw.new_empty(B, C, dtype=torch.float32) for _ in range(2))
    if not x_BChw.numel():
        return y_BChw, mean_BC.zero_(), rstd_BC.zero_()
    P = x_BChw.numel() // (B * C)
    options = launch_options(SUM_TILE, C, P, format is torch.channels_last)
    run_pixels = run_length(P, options)
    runs = triton.cdiv(P, run_pixels)
    share_BR2C = x_BChw.new_empty(B, runs, 2, C, dtype=torch.float32)
    statistics_kernel[(runs * triton.cdiv(C, options["BLOCK_C"]), B)](
        x_BChw, share_BR2C, P, run_pixels, runs, **options, num_warps=4
    )
    combine_statistics_kernel[(groups, B)](
        share_BR2C, mean_BC, rstd_BC, P, run_pixels, runs, eps, **combine_options(C, groups), num_warps=4
    )
    options = launch_options(TILE, C, P, format is torch.channels_last)
    apply_kernel[(triton.cdiv(P, options["BLOCK_P"]) * triton.cdiv(C, options["BLOCK_C"]), B)](
        x_BChw, mean_BC, rstd_BC, weight_C, bias_C, y_BChw, P, **options, num_warps=4
    )
    return y_BChw, mean_BC, rstd_BC


def backward(dy_BChw, x_BChw, mean_BC, rstd_BC, weight_C, bias_C, groups):
    """(dx, dweight, dbias), the last two in float32. A gradient in another memory format than x is copied first."""
    format = memory_format(x_BChw)
    x_BChw, dy_BChw = x_BChw.contiguous(memory_format=format), dy_BChw.contiguous(memory_format=format)
    weight_C, bias_C = weight_C.contiguous(), bias_C.contiguous()
    B, C = x_BChw.shape[:2]
    dx_BChw = torch.empty_like(x_BChw, memory_format=format)
    if not x_BChw.numel():
        return dx_BChw, *(torch.zeros_like(parameter_C, dtype=torch.float32) for parameter_C in (weight_C, bias_C))
    P = x_BChw.numel() // (B * C)
    options = launch_options(SUM_TILE, C, P, format is torch.channels_last)
    run_pixels = run_length(P, options)
    runs = triton.cdiv(P, run_pixels)
    share_BR2C = x_BChw.new_empty(B, runs, 2, C, dtype=torch.float32)
    normal = mean_BC, rstd_BC, weight_C, bias_C
    gradient_sums_kernel[(runs * triton.cdiv(C, options["BLOCK_C"]), B)](
        x_BChw, dy_BChw, *normal, share_BR2C, P, run_pixels, runs, **options, num_warps=4
    )
    dbias_BC, dweight_BC, mean_g_BC, mean_gn_BC = (torch.empty_like(mean_BC) for _ in range(4))
    combine_gradients_kernel[(groups, B)](
        share_BR2C, weight_C, dbias_BC, dweight_BC, mean_g_BC, mean_gn_BC, P, runs,
        **combine_options(C, groups), num_warps=4,
    )  # fmt: skip
    options = launch_options(TILE // 2, C, P, format is torch.channels_last)
    gradient_kernel[(triton.cdiv(P, options["BLOCK_P"]) * triton.cdiv(C, options["BLOCK_C"]), B)](
        x_BChw, dy_BChw, *normal, mean_g_BC, mean_gn_BC, dx_BChw, P, **options, num_warps=4
    )
    return dx_BChw, dweight_BC.sum(0), dbias_BC.sum(0)


def configurations() -> list[Configuration]:
    """The published tokenizer's widths of 160 to 640 channels, channels last, and one of them contiguous; bfloat16."""
    found = []
    for C, channels_last in ((160, True), (320, True), (640, True), (160, False)):
        for kernel, tile in (
            (statistics_kernel, SUM_TILE),
            (combine_statistics_kernel, None),
            (apply_kernel, TILE),
            (gradient_sums_kernel, SUM_TILE),
            (combine_gradients_kernel, None),
            (gradient_kernel, TILE // 2),
        ):
            options = launch_options(tile, C, 65536, channels_last) if tile else combine_options(C, 32)
            activations = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "weight_ptr", "bias_ptr")
            kinds = dict.fromkeys(options, "constexpr") | dict.fromkeys(activations, "*bf16") | {"eps": "fp32"}
            signature = {
                name: kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names
            }
            name = f"group_norm_silu {kernel.__name__.removesuffix('_kernel')} C={C}" + " contiguous" * (
                not channels_last
            )
            even = ("P", "run_pixels") if tile else ("P",)
            found.append(Configuration(name, kernel, signature, options, num_warps=4, divisible_by_16=even))
    return found
