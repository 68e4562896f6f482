"""The native CPU operators by address against float64: `python -m tests.ops.native_checks` checks them all.

test_native_isa.py runs it once for every instruction set, which the extension reads from the environment only once.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from tests.ops.close_draws import near_ties
from var_fast import _C
from var_fast.ops.pyramid_update import pyramid_update_reference
from var_fast.ops.sample_tokens import sample_tokens_reference

TYPES = {torch.float32: 0, torch.bfloat16: 1}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def address(x):
    return 0 if x is None else x.data_ptr()


def error(found, right):
    right = right.double()
    return ((found.double() - right).norm() / right.norm().clamp_min(1e-30)).item()


def check(name, found, right, dtype=torch.float32):
    assert torch.isfinite(found).all(), name
    assert error(found, right) < TOLERANCE[dtype], (name, error(found, right))


def residual_adaln_modulate(x, branch, gate, scale, shift, y, *, stride, M, threads=2, eps=1e-6):
    R, L, C = x.shape
    branch_type = 0 if branch is None else TYPES[branch.dtype]
    modulation = address(gate), address(scale), address(shift), stride
    _C.cpu_residual_adaln_modulate(
        address(x), address(branch), branch_type, *modulation, M, R, L, C, eps, address(y), TYPES[y.dtype], threads
    )


def check_residual_adaln_modulate():
    """All modulations lie interleaved in one array; the last row serves every image after it."""
    g = torch.Generator().manual_seed(1)
    for R, M, L, C in [(1, 1, 1, 1), (2, 2, 3, 5), (5, 3, 7, 37), (4, 1, 2, 64), (3, 2, 40, 200)]:
        for branch_type, y_type in itertools.product([None, *TYPES], TYPES):
            x = torch.randn(R, L, C, generator=g) + 5 * torch.randn(R, L, 1, generator=g)
            branch = None if branch_type is None else torch.randn(R, L, C, generator=g).to(branch_type)
            modulation = torch.randn(M, 3, C, generator=g)
            gate, scale, shift = modulation.unbind(1)
            row = torch.arange(R).clamp_max(M - 1)
            right_x = x.double()
            if branch is not None:
                right_x = right_x + branch.double() * gate.double()[row, None]
            normed = F.layer_norm(right_x, (C,), eps=1e-6)
            right_y = normed * (1 + scale.double()[row, None]) + shift.double()[row, None]
            before, y = x.clone(), torch.empty(R, L, C, dtype=y_type)
            residual_adaln_modulate(x, branch, gate if branch is not None else None, scale, shift, y, stride=3 * C, M=M)
            check("adaln x", x, right_x)
            check(f"adaln y {R, M, L, C}", y, right_y, y_type)
            assert branch is not None or torch.equal(x, before)
    # a mean a thousand times the deviation: the statistics lose nothing that float32 x still holds
    x = 1000 + torch.randn(2, 3, 500, generator=g)
    scale, shift, y = torch.zeros(2, 500), torch.zeros(2, 500), torch.empty(2, 3, 500)
    right_y = F.layer_norm(x.double(), (500,), eps=1e-6)
    residual_adaln_modulate(x, None, None, scale, shift, y, stride=500, M=2)
    check("adaln with a large mean", y, right_y)


def check_gelu():
    g = torch.Generator().manual_seed(2)
    for n, dtype in itertools.product([1, 15, 16, 1000, 40_001], TYPES):
        x = (3 * torch.randn(n, generator=g)).to(dtype)
        right = F.gelu(x.double(), approximate="tanh")
        _C.cpu_gelu(address(x), TYPES[dtype], n, address(x), 2)
        check(f"gelu {n}", x, right, dtype)
        limit = 1e-6 if dtype == torch.float32 else 2**-8  # of each value, but where float32 or the tail loses digits
        assert ((x.double() - right).abs() <= limit * right.abs() + 1e-6).all()
    x = torch.tensor([-1e38, -1e30, -1e3, -60.0, -0.0, 0.0, 60.0, 1e3, 1e30, torch.nan])
    right = F.gelu(x.double(), approximate="tanh").float()
    for dtype in TYPES:
        found = x.to(dtype)
        _C.cpu_gelu(address(found), TYPES[dtype], len(x), address(found), 1)
        torch.testing.assert_close(found, right.to(dtype), equal_nan=True, atol=1e-6, rtol=1e-2)


def group_norm_silu(x, weight, bias, groups, silu, y, threads=2, eps=1e-6):
    types = TYPES[x.dtype], TYPES[y.dtype]
    B, hw, C = x.shape
    _C.cpu_group_norm_silu(
        address(x), types[0], address(weight), address(bias), B, hw, C, groups, eps, silu, address(y), types[1], threads
    )


def check_group_norm_silu():
    g = torch.Generator().manual_seed(3)
    for (B, hw, C, groups), x_type, y_type, silu in itertools.product(
        [(1, 1, 2, 1), (3, 9, 6, 3), (2, 300, 40, 4), (5, 64, 33, 11), (1, 4099, 32, 32)], TYPES, TYPES, [False, True]
    ):
        x = (torch.randn(B, hw, C, generator=g) + 3 * torch.randn(B, 1, C, generator=g)).to(x_type)
        weight, bias = torch.randn(2, C, generator=g)
        double = x.double().transpose(1, 2), groups, weight.double(), bias.double(), 1e-6
        right = F.group_norm(*double).transpose(1, 2)
        right = F.silu(right) if silu else right
        y = torch.empty(B, hw, C, dtype=y_type)
        group_norm_silu(x, weight, bias, groups, silu, y)
        check(f"group norm {B, hw, C}", y, right, y_type)
        again = torch.empty_like(y)
        group_norm_silu(x, weight, bias, groups, silu, again, threads=1)
        assert torch.equal(y, again)  # the threads change nothing
        if x_type == y_type:
            group_norm_silu(x, weight, bias, groups, silu, x)
            assert torch.equal(x, y)  # in place
    x = 1000 + torch.randn(1, 5000, 8, generator=g)  # a mean a thousand times the deviation
    y, ones, zeros = torch.empty_like(x), torch.ones(8), torch.zeros(8)
    group_norm_silu(x, ones, zeros, 4, False, y)
    check("group norm with a large mean", y, F.group_norm(x.double().transpose(1, 2), 4, eps=1e-6).transpose(1, 2))


def draw_tokens(logits, seeds, scale, top_k, top_p, threads=2):
    B, l, V = logits.shape
    idx = torch.empty(B, l, dtype=torch.int64)
    bad = _C.cpu_draw_tokens(address(logits), address(seeds), scale, B, l, V, top_k, top_p, address(idx), threads)
    return idx if bad < 0 else bad


def check_draw_tokens():
    """Continuous logits, and few levels of them, where most tie; sizes on both sides of every vector's."""
    g = torch.Generator().manual_seed(4)
    unsure = 0
    for V, levels, spread in itertools.product([1, 2, 15, 17, 64, 65, 1000, 4096], [None, 1, 2, 9], [0.1, 4.0, 300.0]):
        B, l, scale = 3, 5, V % 11
        logits = torch.randn(B, l, V, generator=g) * spread
        if levels is not None:
            logits = torch.randint(-levels, levels, (B, l, V), generator=g).float() * spread
        logits[0, 0] *= -0.0  # zeros of both signs, which tie
        seeds = torch.randint(-(2**62), 2**62, (B,), generator=g)
        for top_k, top_p in [(0, 0.0), (1, 0.0), (V // 4, 0.96), (0, 0.5), (V, 1.0), (7, 1e-9), (2 * V, 0.999)]:
            right = sample_tokens_reference(logits, None, 0.0, top_k, top_p, seeds, scale)
            found = draw_tokens(logits, seeds, scale, top_k, top_p)
            sure = ~near_ties(logits, None, 0.0, top_k, top_p, seeds, scale)
            assert torch.equal(found[sure], right[sure]), (V, levels, spread, top_k, top_p)
            unsure += int((~sure).sum())
    assert unsure < 500  # of 10080
    for poison in (torch.nan, torch.inf, -torch.inf):
        logits[1, 4, V - 1] = logits[2, 0, 0] = poison
        assert draw_tokens(logits, seeds, 0, 5, 0.9) == 1


def pyramid_update(idx, codes, codebook, weight, bias, ratio, f_hat, pn, pn_next, threads):
    B, C, h, w = f_hat.shape
    next_map = torch.empty(B, pn_next * pn_next, C)
    inputs = address(idx), address(codes), address(codebook), address(weight), address(bias), ratio
    _C.cpu_pyramid_update(*inputs, address(f_hat), B, C, h, w, pn, pn_next, address(next_map), threads)
    return next_map


def check_pyramid_update():
    g = torch.Generator().manual_seed(5)
    sizes = [(1, 1, 1, 1, 1, 1), (1, 32, 16, 16, 5, 6), (3, 32, 16, 16, 16, 16), (2, 4, 7, 9, 4, 5)]
    sizes += [(1, 33, 13, 11, 3, 17), (5, 48, 9, 6, 1, 2), (1, 70, 20, 20, 10, 13), (1, 32, 32, 32, 20, 32)]
    for (B, C, h, w, pn, pn_next), with_phi, by_index in itertools.product(sizes, [False, True], [False, True]):
        codebook = torch.randn(23, C, generator=g)
        idx = torch.randint(23, (B, pn * pn), generator=g)
        weight, bias = torch.randn(C, C, 3, 3, generator=g) * (9 * C) ** -0.5, torch.randn(C, generator=g)
        phi = (weight, bias, 0.3) if with_phi else (None, None, 0.0)
        f_hat = torch.randn(B, C, h, w, generator=g)
        right_f = f_hat.double()
        double = [None if x is None else x.double() for x in (codebook, *phi[:2])]
        right_next = pyramid_update_reference(idx, *double, phi[2], right_f, pn, pn_next)
        tokens = (idx, None, codebook) if by_index else (None, codebook[idx], None)
        for threads in (1, 3):
            found_f = f_hat.clone()
            next_map = pyramid_update(*tokens, *phi, found_f, pn, pn_next, threads)
            check(f"pyramid f_hat {B, C, h, w, pn, pn_next}", found_f, right_f)
            check("pyramid next map", next_map, right_next.flatten(2).transpose(1, 2))
            alone = f_hat.clone()
            pyramid_update(*tokens, *phi, alone, pn, 0, threads)
            assert torch.equal(alone, found_f)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]

if __name__ == "__main__":
    for one in CHECKS:
        one()
    print(_C.cpu_isa(), *(one.__name__ for one in CHECKS))
