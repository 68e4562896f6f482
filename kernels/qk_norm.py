"""qk_norm in Triton: queries and keys of the packed projection at unit length, queries times their head's scale.

Bound by memory. With N the bytes of one of q, k, v, the forward reads q and k where the projection put them and writes
them (4 N); v is never touched. The backward reads q, k and the three gradients and writes the packed gradient whole
(8 N), so nothing has to be zeroed, stacked or added afterwards. A vector of D numbers is one row of a tile, its norm a
reduction among a few neighbouring threads, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from var_fast.kernels.configuration import Configuration

TILE = 4096
"""Elements of q, and as many of k, that a program of the forward holds."""
BACKWARD_TILE = 2048
"""The same of the backward, which holds five tensors."""
PROGRAMS = 4224
"""Programs of a backward launch, at most about: thirty-two for each multiprocessor of an H100 or H200, eight times
what it holds at once, so that the last ones to finish leave little idle."""
SHORTEST = tl.constexpr(1e-12)
"""Vectors shorter than this are divided by it, as F.normalize does."""


@triton.jit
def forward_kernel(
    qkv_ptr, scale_ptr, q_ptr, k_ptr, row_count,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (token, head), the head fastest
    d = tl.arange(0, BLOCK_D)
    inside = (rows < row_count)[:, None] & (d < D)[None, :]
    heads = rows % H
    at = ((rows // H).to(tl.int64) * (3 * H * D) + heads * D)[:, None] + d[None, :]
    q = tl.load(qkv_ptr + at, inside, 0.0).to(tl.float32)
    k = tl.load(qkv_ptr + at + H * D, inside, 0.0).to(tl.float32)
    scale = tl.load(scale_ptr + heads).to(tl.float32)
    q *= (scale / tl.maximum(tl.sqrt_rn(tl.sum(q * q, axis=1)), SHORTEST))[:, None]
    k *= (1.0 / tl.maximum(tl.sqrt_rn(tl.sum(k * k, axis=1)), SHORTEST))[:, None]
    to = rows.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(q_ptr + to, q.to(q_ptr.dtype.element_ty), inside)
    tl.store(k_ptr + to, k.to(k_ptr.dtype.element_ty), inside)


@triton.jit
def _normalise_backward(x, dy, scale):
    """(gradient of x (ROWS, BLOCK_D), gradient of each row's scale (ROWS,)) of y = scale x / max(|x|, SHORTEST)."""
    norm = tl.sqrt_rn(tl.sum(x * x, axis=1))
    inverse = 1.0 / tl.maximum(norm, SHORTEST)
    unit = x * inverse[:, None]
    dscale = tl.sum(dy * unit, axis=1)
    # a vector at the floor is divided by a constant: nothing of its gradient is taken away along it
    along = tl.where(norm >= SHORTEST, dscale, 0.0)
    return (dy - unit * along[:, None]) * (scale * inverse)[:, None], dscale


@triton.jit
def backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, scale_ptr, dqkv_ptr, dscale_ptr, row_count, rounds,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From round to round a program moves on by ROWS times the number of programs, a multiple of H: each of its rows
    keeps its head, and dscale (programs, ROWS) is summed in place, to be folded by heads at the end."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    stride = tl.num_programs(0) * ROWS
    d = tl.arange(0, BLOCK_D)
    heads = rows % H
    scale = tl.load(scale_ptr + heads).to(tl.float32)
    at = ((rows // H).to(tl.int64) * (3 * H * D) + heads * D)[:, None] + d[None, :]
    grad_at = rows.to(tl.int64)[:, None] * D + d[None, :]
    dscale = tl.zeros([ROWS], tl.float32)
    for _ in range(rounds):
        inside = (rows < row_count)[:, None] & (d < D)[None, :]
        q = tl.load(qkv_ptr + at, inside, 0.0).to(tl.float32)
        k = tl.load(qkv_ptr + at + H * D, inside, 0.0).to(tl.float32)
        dq = tl.load(dq_ptr + grad_at, inside, 0.0).to(tl.float32)
        dk = tl.load(dk_ptr + grad_at, inside, 0.0).to(tl.float32)
        dv = tl.load(dv_ptr + grad_at, inside, 0.0)
        dq, dscale_q = _normalise_backward(q, dq, scale)
        dk, _ = _normalise_backward(k, dk, tl.full([ROWS], 1.0, tl.float32))
        dscale += dscale_q
        tl.store(dqkv_ptr + at, dq.to(dqkv_ptr.dtype.element_ty), inside)
        tl.store(dqkv_ptr + at + H * D, dk.to(dqkv_ptr.dtype.element_ty), inside)
        tl.store(dqkv_ptr + at + 2 * H * D, dv.to(dqkv_ptr.dtype.element_ty), inside)
        rows += stride
        at += stride.to(tl.int64) * (3 * D)
        grad_at += stride.to(tl.int64) * D
    tl.store(dscale_ptr + tl.program_id(0) * ROWS + tl.arange(0, ROWS), dscale)


def launch_options(D: int, backward: bool = False) -> dict[str, int]:
    block_d = triton.next_power_of_2(D)
    return dict(ROWS=max(1, (BACKWARD_TILE if backward else TILE) // block_d), BLOCK_D=block_d)


def forward(qkv_BL3HD, scale_H):
    """(q, k), contiguous. A packed projection that is not contiguous is copied first."""
    qkv_BL3HD, scale_H = qkv_BL3HD.contiguous(), scale_H.contiguous()
    B, L, _, H, D = qkv_BL3HD.shape
    q_BLHD, k_BLHD = qkv_BL3HD.new_empty(B, L, H, D), qkv_BL3HD.new_empty(B, L, H, D)
    options = launch_options(D)
    if q_BLHD.numel():
        forward_kernel[(triton.cdiv(B * L * H, options["ROWS"]),)](
            qkv_BL3HD, scale_H, q_BLHD, k_BLHD, B * L * H, H=H, D=D, **options, num_warps=4
        )
    return q_BLHD, k_BLHD


def backward(dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H):
    """(dqkv, dscale in float32), contiguous. Gradients that are not contiguous are copied first."""
    dq_BLHD, dk_BLHD, dv_BLHD = (d.contiguous() for d in (dq_BLHD, dk_BLHD, dv_BLHD))
    qkv_BL3HD, scale_H = qkv_BL3HD.contiguous(), scale_H.contiguous()
    B, L, _, H, D = qkv_BL3HD.shape
    dqkv_BL3HD = torch.empty_like(qkv_BL3HD)
    if not dqkv_BL3HD.numel():
        return dqkv_BL3HD, scale_H.new_zeros(H, dtype=torch.float32)
    options = launch_options(D, backward=True)
    programs, rounds = _share(triton.cdiv(B * L * H, options["ROWS"]), H)
    parts = dqkv_BL3HD.new_empty(programs * options["ROWS"] // H, H, dtype=torch.float32)
    backward_kernel[(programs,)](
        dq_BLHD, dk_BLHD, dv_BLHD, qkv_BL3HD, scale_H, dqkv_BL3HD, parts, B * L * H, rounds,
        H=H, D=D, **options, num_warps=4,
    )  # fmt: skip
    return dqkv_BL3HD, parts.sum(0)


def _share(tiles: int, H: int) -> tuple[int, int]:
    """(programs, rounds) for `tiles` tiles: programs a multiple of H, all with the same number of rounds."""
    rounds = triton.cdiv(tiles, PROGRAMS)
    return triton.cdiv(triton.cdiv(tiles, rounds), H) * H, rounds


def configurations() -> list[Configuration]:
    """Heads of 64 as in the published models of 16 to 36 blocks, and the other head sizes; bfloat16."""
    found = []
    for H, D in ((16, 64), (30, 64), (36, 64), (16, 32), (20, 96), (16, 128)):
        for kernel in (forward_kernel, backward_kernel):
            options = dict(H=H, D=D, **launch_options(D, backward=kernel is backward_kernel))
            kinds = {"scale_ptr": "*fp32", "dscale_ptr": "*fp32"} | dict.fromkeys(options, "constexpr")
            signature = {
                name: kinds.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in kernel.arg_names
            }
            name = f"qk_norm {kernel.__name__.removesuffix('_kernel')} H={H} D={D}"
            found.append(Configuration(name, kernel, signature, options, num_warps=4))
    return found
