"""multiscale_quantize in Triton: two launches a scale, for any batch and any size of map.

`search_kernel`, a program for a few tokens: mean of the rest over each token's area, and codebook_search's `nearest`.
`update_kernel`, a program for a run of pixels: bicubic up from the codes, phi, and f_hat and the rest moved on. The
convolution needs the up-sampled map around its pixels too; a program makes that part itself, in a piece of memory that
no other program touches, so that neighbours need not wait for each other. Between the launches only indices and the
rest, (B, h w, C) float32, are in memory, and at the usual sizes that stays in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from var_fast.kernels import codebook_search
from var_fast.kernels.codebook_search import nearest
from var_fast.kernels.configuration import Configuration

LARGE = 8192
"""From so many pixels on, long runs of pixels: less of the up-sampled map is made twice."""
PRECISION = "tf32x3"
"""Of phi's products: three tf32 products, nearly as exact as float32's own (relative error about 2^-22)."""


# Not specialised for what changes from scale to scale: three kernels serve a pyramid, not one for every scale.
@triton.jit(do_not_specialize=["N", "ph", "pw", "window_h", "window_w"])
def search_kernel(
    rest_ptr, idx_ptr, codebook_ptr, high_ptr, low_ptr, half_norm_ptr,
    N, V, C, tiles, h, w, ph, pw, window_h, window_w, stride_b, stride_c, stride_y, stride_x,
    COSINE: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Indices of the codes nearest to the means of the rest over areas, N = B ph pw of them; no area is larger than
    window_h x window_w. Areas are those of adaptive average pooling: from floor(i h / ph) to ceil((i + 1) h / ph)."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    image, ty, tx = n // (ph * pw), n // pw % ph, n % pw
    top, bottom = ty * h // ph, ((ty + 1) * h + ph - 1) // ph
    left, right = tx * w // pw, ((tx + 1) * w + pw - 1) // pw
    c = tl.arange(0, BLOCK_C)
    start_ptr = rest_ptr + image.to(tl.int64)[:, None] * stride_b + (c * stride_c)[None, :]
    read = inside[:, None] & (c < C)[None, :]
    z = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for down in range(window_h):
        y = top + down
        for along in range(0, window_w, WINDOW):
            x = left[:, None] + along + tl.arange(0, WINDOW)[None, :]
            at = y[:, None] * stride_y + x * stride_x
            there = (y < bottom)[:, None] & (x < right[:, None])
            piece = tl.load(start_ptr[:, None, :] + at[:, :, None], read[:, None, :] & there[:, :, None], 0.0)
            z += tl.sum(piece, axis=1)
    height, width = (bottom - top).to(tl.float32), (right - left).to(tl.float32)
    z = tl.div_rn(tl.div_rn(z, height[:, None]), width[:, None])
    index = nearest(
        z, inside, codebook_ptr, high_ptr, low_ptr, half_norm_ptr, V, C, tiles, COSINE, ROWS, BLOCK_V, BLOCK_C, AGAIN
    )
    tl.store(idx_ptr + n, index.to(tl.int64), inside)


@triton.jit
def _weight(tap: tl.constexpr, t):
    """Cubic convolution's weight (A = -0.75) of the tap-th of four neighbours, t in [0, 1) beyond the second."""
    if tap == 0 or tap == 3:
        x = t + 1.0 if tap == 0 else 2.0 - t
        weight = ((-0.75 * x + 3.75) * x - 6.0) * x + 3.0
    else:
        x = t if tap == 1 else 1.0 - t
        weight = (1.25 * x - 2.25) * x * x + 1.0
    return weight


@triton.jit
def _up(pixel, inside, idx_ptr, codebook_ptr, w, ph, pw, scale_y, scale_x, C, UP: tl.constexpr, BLOCK_C: tl.constexpr):
    """The map of an image's tokens at `pixel` (P,): (P, BLOCK_C), 0 outside. Along x first, as F.interpolate does."""
    c = tl.arange(0, BLOCK_C)
    read = inside[:, None] & (c < C)[None, :]
    if UP:
        y = scale_y * ((pixel // w).to(tl.float32) + 0.5) - 0.5
        x = scale_x * ((pixel % w).to(tl.float32) + 0.5) - 0.5
        top, left = tl.floor(y), tl.floor(x)
        h = tl.zeros([pixel.shape[0], BLOCK_C], tl.float32)
        for i in tl.static_range(4):
            ty = tl.minimum(tl.maximum(top.to(tl.int32) + (i - 1), 0), ph - 1)
            row = tl.zeros([pixel.shape[0], BLOCK_C], tl.float32)
            for j in tl.static_range(4):
                tx = tl.minimum(tl.maximum(left.to(tl.int32) + (j - 1), 0), pw - 1)
                code = tl.load(idx_ptr + ty * pw + tx, inside, 0)
                e = tl.load(codebook_ptr + code[:, None] * C + c[None, :], read, 0.0)
                row += e * _weight(j, x - left)[:, None]
            h += row * _weight(i, y - top)[:, None]
    else:
        code = tl.load(idx_ptr + pixel, inside, 0)
        h = tl.load(codebook_ptr + code[:, None] * C + c[None, :], read, 0.0)
    return h


@triton.jit(do_not_specialize=["ph", "pw"])
def update_kernel(
    rest_in_ptr, rest_out_ptr, sum_in_ptr, sum_out_ptr, idx_ptr, codebook_ptr, weight_ptr, bias_ptr, map_ptr,
    keep, ratio, h, w, C, ph, pw, scale_y, scale_x, stride_b, stride_c, stride_y, stride_x,
    FIRST: tl.constexpr, LAST: tl.constexpr, UP: tl.constexpr, CONVOLVE: tl.constexpr,
    PIXELS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f_hat + phi(up), rest - phi(up), phi(up) = keep * up + ratio * (convolution + bias). rest_in has the strides
    given, rest_out is (B, h w, C); sums are (B, C, h, w). weight is (3, 3, C in, C out)."""
    run, image = tl.program_id(0), tl.program_id(1)
    image_long = image.to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    first = run * PIXELS
    pixel = first + tl.arange(0, PIXELS)
    write = (pixel < h * w)[:, None] & (c < C)[None, :]
    idx_ptr += image_long * ph * pw
    if CONVOLVE:
        # the map from a row and a pixel before the run to a row and a pixel after it, 0 above and below the image
        map_ptr += (image_long * tl.num_programs(0) + run) * (CHUNKS * CHUNK * BLOCK_C)
        for chunk in range(CHUNKS):
            place = chunk * CHUNK + tl.arange(0, CHUNK)
            around = first - w - 1 + place
            inside = (around >= 0) & (around < h * w)
            up = _up(around, inside, idx_ptr, codebook_ptr, w, ph, pw, scale_y, scale_x, C, UP, BLOCK_C)
            tl.store(map_ptr + place[:, None] * BLOCK_C + c[None, :], up)
        tl.debug_barrier()  # what one thread of the program wrote, another reads
        total = tl.zeros([PIXELS, BLOCK_C], tl.float32)
        for tap in range(9):
            dy, dx = tap // 3 - 1, tap % 3 - 1
            x = pixel % w + dx
            place = pixel - first + (dy + 1) * w + dx + 1
            beside = tl.load(map_ptr + place[:, None] * BLOCK_C + c[None, :], ((x >= 0) & (x < w))[:, None], 0.0)
            at = (tap * C + c)[:, None] * C + c[None, :]
            weight = tl.load(weight_ptr + at, (c < C)[:, None] & (c < C)[None, :], 0.0)
            total = tl.dot(beside, weight, total, input_precision=PRECISION)
        total += tl.load(bias_ptr + c, c < C, 0.0)[None, :]
        place = pixel - first + w + 1
        moved = tl.load(map_ptr + place[:, None] * BLOCK_C + c[None, :]) * keep + total * ratio
    else:
        moved = _up(pixel, pixel < h * w, idx_ptr, codebook_ptr, w, ph, pw, scale_y, scale_x, C, UP, BLOCK_C)
    at = (image_long * C + c)[None, :] * (h * w) + pixel[:, None]
    before = tl.zeros([PIXELS, BLOCK_C], tl.float32)
    if not FIRST:
        before = tl.load(sum_in_ptr + at, write, 0.0)
    tl.store(sum_out_ptr + at, before + moved, write)
    if not LAST:
        at = image_long * stride_b + (pixel // w * stride_y + pixel % w * stride_x)[:, None] + (c * stride_c)[None, :]
        rest = tl.load(rest_in_ptr + at, write, 0.0)
        at = (image_long * (h * w) + pixel)[:, None] * C + c[None, :]
        tl.store(rest_out_ptr + at, rest - moved, write)


def search_options(N: int, C: int, window_w: int) -> tuple[dict[str, int], int]:
    """(tile sizes, warps) of `search_kernel`."""
    # many rows times wide pieces of areas would not fit into registers
    options, warps = codebook_search.launch_options(N if window_w <= 4 else 1, C)
    window = 1 if options["ROWS"] > 16 else 4 if window_w <= 4 else 16
    return dict(WINDOW=window, **options), warps


def update_options(pixels: int, w: int, C: int) -> tuple[dict[str, int], int]:
    """(tile sizes, warps) of `update_kernel` for a batch of `pixels` pixels in all, `w` in a row."""
    run, chunk, warps = (128, 64, 8) if pixels >= LARGE else (32, 32, 8)
    chunks = triton.cdiv(run + 2 * w + 2, chunk)
    return dict(PIXELS=run, CHUNK=chunk, CHUNKS=chunks, BLOCK_C=codebook_search.channel_block(C)), warps


def largest_window(size: int, parts: int) -> int:
    """The longest piece of `size` that adaptive pooling to `parts` takes the mean of."""
    return max(-(-(i + 1) * size // parts) - i * size // parts for i in range(parts))


def quantize(
    f_BChw: torch.Tensor,
    codebook_VC: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    ratios: Sequence[float],
    layers: Sequence[int],
    sizes: Sequence[int],
    cosine: bool,
    every_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(idx, f_hat): int64 tokens of one scale after the other, each (B, ph pw), as one vector; and f_hat (1, B, C, h,
    w), or with `every_sum` that of every scale, (S, B, C, h, w).

    `sizes`: ph, pw of every scale in turn; `layers`: which layer of phi each scale takes, -1 for none. A layer has
    `weights` (C, C, 3, 3), `biases` (C,) and a ratio.
    """
    f_BChw = f_BChw.to(torch.float32)
    B, C, h, w = f_BChw.shape
    scales = list(zip(sizes[::2], sizes[1::2], layers))
    options, update_warps = update_options(B * h * w, w, C)
    runs = triton.cdiv(h * w, options["PIXELS"])
    tokens = [B * ph * pw for ph, pw, _ in scales]
    idx = f_BChw.new_empty(sum(tokens), dtype=torch.int64)
    sums = f_BChw.new_empty(len(scales) if every_sum else 1, B, C, h, w)
    if not B:
        return idx, sums
    codebook = codebook_search.prepare(codebook_VC, cosine)
    V, padded = len(codebook.codebook_VC), len(codebook.half_norm)
    rest_BpC = f_BChw.new_empty(B, h * w, C)
    maps, convolutions = rest_BpC, [(rest_BpC, rest_BpC)]  # without phi they are not read
    if weights:
        weight = torch.stack(list(weights)).to(torch.float32).permute(0, 3, 4, 2, 1).contiguous()
        bias = torch.stack(list(biases)).to(torch.float32)
        maps = f_BChw.new_empty(B, runs, options["CHUNKS"] * options["CHUNK"], options["BLOCK_C"])
        convolutions = list(zip(weight.unbind(0), bias.unbind(0)))
    idx_per_scale = idx.split(tokens)
    sum_per_scale = sums.unbind(0) if every_sum else (sums,) * len(scales)
    rest, strides = f_BChw, f_BChw.stride()
    for si, (ph, pw, layer) in enumerate(scales):
        window_h, window_w = largest_window(h, ph), largest_window(w, pw)
        tiles, search_warps = search_options(tokens[si], C, window_w)
        search_kernel[(triton.cdiv(tokens[si], tiles["ROWS"]),)](
            rest, idx_per_scale[si], *codebook, tokens[si], V, C, padded // tiles["BLOCK_V"],
            h, w, ph, pw, window_h, window_w, *strides, COSINE=cosine, num_warps=search_warps, **tiles,
        )  # fmt: skip
        ratio = ratios[layer] if layer >= 0 else 0.0
        update_kernel[(runs, B)](
            rest, rest_BpC, sum_per_scale[max(si - 1, 0)], sum_per_scale[si],
            idx_per_scale[si], codebook.codebook_VC, *convolutions[max(layer, 0)], maps,
            float(1 - ratio), float(ratio), h, w, C, ph, pw, ph / h, pw / w, *strides,
            FIRST=si == 0, LAST=si == len(scales) - 1, UP=(ph, pw) != (h, w), CONVOLVE=layer >= 0,
            PRECISION=PRECISION, num_warps=update_warps, **options,
        )  # fmt: skip
        rest, strides = rest_BpC, (h * w * C, 1, w * C, C)
    return idx, sums


def configurations() -> list[Configuration]:
    """Pyramids of 256 and 512 px, 32 channels, for one image and for a batch. At the first scale f is read, whose
    pixels lie side by side, and later the rest, whose channels do."""
    found = []
    for N, window_w, side_by_side in (
        (1, 16, "stride_x"),
        (1, 4, "stride_c"),
        (codebook_search.FEW + 1, 4, "stride_c"),
    ):
        options, warps = search_options(N, 32, window_w)
        name = f"multiscale_quantize search rows={options['ROWS']} window={options['WINDOW']}"
        options |= {"COSINE": False, side_by_side: 1}
        found.append(codebook_search.configuration(name, search_kernel, options, warps, matrix=True))
    types = dict.fromkeys(("keep", "ratio", "scale_y", "scale_x"), "fp32")
    for pixels, w in ((256, 16), (LARGE, 16), (LARGE, 32)):
        for place in ("first", "middle", "last"):
            options, warps = update_options(pixels, w, 32)
            name = f"multiscale_quantize update pixels={options['PIXELS']} w={w} {place}"
            options |= dict(FIRST=place == "first", LAST=place == "last", UP=place != "last", CONVOLVE=True)
            options |= {"PRECISION": PRECISION, "stride_x" if place == "first" else "stride_c": 1}
            found.append(codebook_search.configuration(name, update_kernel, options, warps, types, matrix=True))
    return found
