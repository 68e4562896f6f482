"""codebook_search in Triton: a product on the tensor cores that leaves few candidates, then float64 decides.

The nearest code has the least score |e|^2 / 2 - z e. The first pass takes z e from halves: z = z1 + z2, e = e1 + e2 in
bfloat16, z1 e1 + z1 e2 + z2 e1 summed in float32. Nothing of size N x V is stored: a program goes through the codes in
tiles as wide as it has lanes, and every lane keeps its least score, that score's tile, and its second least score. The
error of a score has a proven bound (`_error`), so the nearest code has a score within two such errors of the least one.
The codes for which that holds, one in almost every row, are compared in float64. Only where one lane holds two of them,
as in a codebook full of equal codes, is the row searched again, in float64 throughout. So the answer is float64's, and
the lowest index where codes are equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from var_fast.kernels.configuration import Configuration

PADDING = 256
"""Codes are padded to a multiple of this, with codes infinitely far away: no tile needs a mask."""
FEW = 4096
"""Up to so many vectors, small tiles of rows: enough programs for all multiprocessors, and each of them soon done."""


@triton.jit
def _split(x, half: tl.constexpr):
    """Two halves whose sum is x to 2^-18."""
    high = x.to(half)
    return high, (x - high.to(tl.float32)).to(half)


@triton.jit
def _error(z_norm, e_norm, BLOCK_C: tl.constexpr):
    """How far the score of a code of length `e_norm` may be off.

    Split product: three terms of 2^-18 |z| |e| are left out (z2 e2, and what the halves miss of z and of e).
    Sum: 3 C products in float32; even where the tensor cores cut off, each loses at most 2^-23 of |z| |e|, and so does
    each of their partial sums, together less than 4 C.
    |e|^2 / 2 and the subtraction: 2^-24 each of at most |e|^2 and |z| |e|.
    All rounded up by 4% and more, for the rounding of this bound itself. The last term stands for underflow.
    """
    return (1.2e-5 + 5e-7 * (BLOCK_C + 1)) * z_norm * e_norm + 1.2e-7 * e_norm * e_norm + 2e-36


@triton.jit
def _exact_distance(z, e, COSINE: tl.constexpr):
    """Squared distance, or minus the cosine times |z|, along the last axis, in float64."""
    if COSINE:
        distance = -tl.sum(z * e, axis=1) / tl.maximum(tl.sqrt(tl.sum(e * e, axis=1)), 1e-12)
    else:
        distance = tl.sum((z - e) * (z - e), axis=1)
    return distance


@triton.jit
def prepare_kernel(
    codebook_ptr, high_ptr, low_ptr, half_norm_ptr, V, C,
    COSINE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Halves (padded V, BLOCK_C) and |e|^2 / 2 of every code; for cosine halves of e / |e|, and 0."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    c = tl.arange(0, BLOCK_C)
    e = tl.load(codebook_ptr + v[:, None] * C + c[None, :], (v < V)[:, None] & (c < C)[None, :], 0.0)
    exact = e.to(tl.float64)
    squared = tl.sum(exact * exact, axis=1)
    half_norm = (squared * 0.5).to(tl.float32)
    if COSINE:
        e = (exact / tl.maximum(tl.sqrt(squared), 1e-12)[:, None]).to(tl.float32)
        half_norm = tl.zeros_like(half_norm)
    high, low = _split(e, high_ptr.dtype.element_ty)
    at = v[:, None] * BLOCK_C + c[None, :]
    tl.store(high_ptr + at, high)
    tl.store(low_ptr + at, low)
    tl.store(half_norm_ptr + v, tl.where(v < V, half_norm, float("inf")))


@triton.jit
def nearest(
    z, inside, codebook_ptr, high_ptr, low_ptr, half_norm_ptr, V, C, tiles,
    COSINE: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Index of the nearest code, (ROWS,) int32, of each row of z (ROWS, BLOCK_C) float32, 0 outside."""
    c = tl.arange(0, BLOCK_C)
    lanes = tl.arange(0, BLOCK_V)
    z_high, z_low = _split(z, high_ptr.dtype.element_ty)
    least = tl.full([ROWS, BLOCK_V], float("inf"), tl.float32)
    second = tl.full([ROWS, BLOCK_V], float("inf"), tl.float32)
    tile_of_least = tl.zeros([ROWS, BLOCK_V], tl.int32)
    for tile in range(tiles):
        v = tile * BLOCK_V + lanes
        at = v[None, :] * BLOCK_C + c[:, None]
        high = tl.load(high_ptr + at)
        low = tl.load(low_ptr + at)
        product = tl.dot(z_low, high)
        product = tl.dot(z_high, low, product)
        product = tl.dot(z_high, high, product)
        score = tl.load(half_norm_ptr + v)[None, :] - product
        second = tl.minimum(second, tl.maximum(least, score))
        tile_of_least = tl.where(score < least, tile, tile_of_least)
        least = tl.minimum(least, score)

    codes = tile_of_least * BLOCK_V + lanes[None, :]
    row_least = tl.min(least, axis=1)
    index = tl.min(tl.where(least == row_least[:, None], codes, V - 1), axis=1)
    # The nearest code's score is at most that of `index`, s, so |e|^2 / 2 - |z| |e| <= s bounds how long it can be.
    z_norm = tl.sqrt(tl.sum(z * z, axis=1))
    if COSINE:
        length = tl.full([ROWS], 1.0, tl.float32)
        longest = length
    else:
        length = tl.sqrt(2.0 * tl.load(half_norm_ptr + index))
        score = row_least + _error(z_norm, length, BLOCK_C)
        longest = z_norm + tl.sqrt(tl.maximum(z_norm * z_norm + 2.0 * score, 0.0))
    limit = row_least + _error(z_norm, length, BLOCK_C) + _error(z_norm, longest, BLOCK_C)
    # z out of the range that the bound is for (infinite, NaN, or so short that z^2 underflows) is searched again, too
    settled = (tl.min(second, axis=1) > limit) & (row_least > float("-inf")) & (limit < float("inf"))
    if COSINE:
        settled = settled & (z_norm > 1e-15)  # of distances, the bound's last two terms cover such z
    exact_z = z.to(tl.float64)

    candidates = (least <= limit[:, None]) & (settled & inside)[:, None]
    distance = tl.full([ROWS], float("inf"), tl.float64)
    most = tl.max(tl.sum(candidates.to(tl.int32), axis=1), axis=0)
    for _ in range(tl.where(most > 1, most, 0)):  # a candidate of each row in turn, in order of their indices
        code = tl.min(tl.where(candidates, codes, V), axis=1)
        e = tl.load(codebook_ptr + code[:, None] * C + c[None, :], (code < V)[:, None] & (c < C)[None, :], 0.0)
        new = _exact_distance(exact_z, e.to(tl.float64), COSINE)
        nearer = (code < V) & (new < distance)
        distance = tl.where(nearer, new, distance)
        index = tl.where(nearer, code, index)
        candidates = candidates & (codes != code[:, None])

    rows = tl.arange(0, ROWS)
    again = inside & (settled == 0)
    for _ in range(tl.sum(again.to(tl.int32), axis=0)):
        row = tl.min(tl.where(again, rows, ROWS), axis=0)
        exact_row = tl.sum(tl.where((rows == row)[:, None], exact_z, 0.0), axis=0)[None, :]
        distance_here = tl.full([AGAIN], float("inf"), tl.float64)
        code_here = tl.zeros([AGAIN], tl.int32)
        for first in range(0, V, AGAIN):
            v = first + tl.arange(0, AGAIN)
            e = tl.load(codebook_ptr + v[:, None] * C + c[None, :], (v < V)[:, None] & (c < C)[None, :], 0.0)
            new = _exact_distance(exact_row, e.to(tl.float64), COSINE)
            nearer = (v < V) & (new < distance_here)
            distance_here = tl.where(nearer, new, distance_here)
            code_here = tl.where(nearer, v, code_here)
        code = tl.min(tl.where(distance_here == tl.min(distance_here, axis=0), code_here, V), axis=0)
        index = tl.where(rows == row, code, index)
        again = again & (rows != row)
    return index


@triton.jit(do_not_specialize=["N"])
def search_kernel(
    z_ptr, idx_ptr, codebook_ptr, high_ptr, low_ptr, half_norm_ptr, N, V, C, tiles,
    COSINE: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    z = tl.load(z_ptr + n[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
    index = nearest(
        z, n < N, codebook_ptr, high_ptr, low_ptr, half_norm_ptr, V, C, tiles, COSINE, ROWS, BLOCK_V, BLOCK_C, AGAIN
    )
    tl.store(idx_ptr + n, index.to(tl.int64), n < N)


class Prepared(NamedTuple):
    """A codebook as the search reads it, in the order of the kernel's arguments."""

    codebook_VC: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    half_norm: torch.Tensor


def launch_options(N: int, C: int) -> tuple[dict[str, int], int]:
    """(tile sizes, warps) of a program's search among the codes for its share of `N` vectors."""
    block_c = channel_block(C)
    if N <= FEW:
        return dict(ROWS=16, BLOCK_V=256 if block_c <= 32 else 128, BLOCK_C=block_c, AGAIN=4096 // block_c), 8
    return dict(ROWS=64, BLOCK_V=32, BLOCK_C=block_c, AGAIN=1024 // block_c), 4


def channel_block(C: int) -> int:
    """Channels of a tile: a power of two, and no less than a product on the tensor cores takes."""
    return max(16, triton.next_power_of_2(C))


def prepare(codebook_VC: torch.Tensor, cosine: bool, half: torch.dtype | None = None) -> Prepared:
    """The halves of the codes, in type `half`: bfloat16, which has the range of float32."""
    if half is None:
        # Triton's interpreter cannot multiply bfloat16
        half = torch.float32 if triton.knobs.runtime.interpret else torch.bfloat16
    codebook_VC = codebook_VC.to(torch.float32).contiguous()
    V, C = codebook_VC.shape
    padded, block_c = triton.cdiv(V, PADDING) * PADDING, channel_block(C)
    high, low = codebook_VC.new_empty(2, padded, block_c, dtype=half)
    half_norm = codebook_VC.new_empty(padded)
    rows = 2048 // block_c
    prepare_kernel[(padded // rows,)](
        codebook_VC, high, low, half_norm, V, C, COSINE=cosine, BLOCK_V=rows, BLOCK_C=block_c, num_warps=4
    )
    return Prepared(codebook_VC, high, low, half_norm)


def search(z_NC: torch.Tensor, codebook: Prepared, cosine: bool) -> torch.Tensor:
    """Index of the code nearest to each vector, (N,) int64."""
    z_NC = z_NC.contiguous()
    N, C = z_NC.shape
    idx_N = z_NC.new_empty(N, dtype=torch.int64)
    options, warps = launch_options(N, C)
    if N:
        tiles = len(codebook.half_norm) // options["BLOCK_V"]
        search_kernel[(triton.cdiv(N, options["ROWS"]),)](
            z_NC, idx_N, *codebook, N, len(codebook.codebook_VC), C, tiles, COSINE=cosine, num_warps=warps, **options
        )
    return idx_N


def configurations() -> list[Configuration]:
    """Few and many vectors, for all numbers of channels."""
    found = []
    for C in (16, 32, 64):
        block_c = channel_block(C)
        options = dict(COSINE=False, BLOCK_V=2048 // block_c, BLOCK_C=block_c)
        found.append(configuration(f"codebook_search prepare C={C}", prepare_kernel, options, 4))
        for N in (FEW, FEW + 1):
            options, warps = launch_options(N, C)
            name = f"codebook_search C={C} rows={options['ROWS']}"
            found.append(configuration(name, search_kernel, dict(COSINE=False, **options), warps, matrix=True))
    options, warps = launch_options(FEW + 1, 32)
    cosine = dict(COSINE=True, **options)
    return [*found, configuration("codebook_search C=32 cosine", search_kernel, cosine, warps, matrix=True)]


def configuration(name, kernel, options, warps, types=(), matrix=False) -> Configuration:
    """One of this operator's or of multiscale_quantize's; `types` of arguments that are not "*fp32" or "i32"."""
    types = {"idx_ptr": "*i64", "high_ptr": "*bf16", "low_ptr": "*bf16", **dict(types)}
    signature = {
        argument: "constexpr"
        if argument in options
        else types.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")
        for argument in kernel.arg_names
    }
    even = ("V", "C", "tiles", "h", "w", "stride_b", "stride_y", "stride_x")
    even = tuple(name for name in even if signature.get(name) == "i32")
    return Configuration(name, kernel, signature, options, warps, matrix=matrix, divisible_by_16=even)
