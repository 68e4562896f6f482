"""What every CUDA operator has to do, at any size: its float64 reference, on a GPU or on the CPU (tests/cuda/host.py).

Each check makes its inputs from a seed, runs the operator through `ops`, and asserts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.cuda.operators import Operators
from tests.ops.close_draws import photo_finishes
from var_fast.engine.native_model import tap_weights
from var_fast.ops.pyramid_update import pyramid_update_reference
from var_fast.ops.sample_tokens import sample_tokens_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# ||out - ref|| / ||ref||: one rounding to the type, and float32 arithmetic before it
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}


def assert_close(out: torch.Tensor, reference: torch.Tensor, bound: float):
    out, reference = out.detach().cpu().double(), reference.detach().cpu().double()
    assert out.shape == reference.shape
    error = ((out - reference).norm() / reference.norm().clamp_min(1e-30)).item()
    assert error <= bound, f"relative error {error:.2e}, bound {bound:.0e}"  # NaN fails too


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_residual_adaln_modulate(ops: Operators, dtype, R, L, C, M, residual=True, branch_dtype=None, seed=0):
    g, eps = generator(seed), 1e-6
    x_RLC = torch.randn(R, L, C, generator=g) * 3 + torch.randn(R, L, 1, generator=g) * 5
    branch_RLC = torch.randn(R, L, C, generator=g).to(branch_dtype or dtype) if residual else None
    parameters = torch.randn(M, 6, C, generator=g)  # of both halves of a block, as the loop has them
    placed = ops.place(parameters)
    rows = torch.arange(R).clamp_max(M - 1)
    gate, scale, shift = (parameters[rows, i].double().unsqueeze(1) for i in (1, 2, 5))
    expected_x = x_RLC.double() + (gate * branch_RLC.double() if residual else 0)
    expected = F.layer_norm(expected_x, (C,), eps=eps) * (1 + scale) + shift

    x = ops.place(x_RLC)
    branch = None if branch_RLC is None else ops.place(branch_RLC)
    y = ops.residual_adaln_modulate(x, branch, placed[:, 1], placed[:, 2], placed[:, 5], 6 * C, eps, dtype)
    assert_close(y, expected, BOUNDS[dtype])
    if residual:
        assert_close(x, expected_x, BOUNDS[torch.float32])
    else:
        assert torch.equal(x.cpu(), x_RLC)
    return y


def check_qk_norm(ops: Operators, dtype, S, R, l, H, D, begin, capacity, scaled=True, seed=0):
    g = generator(seed)
    qkv = torch.randn(S, l, 3, H, D, generator=g).to(dtype)
    if scaled:
        # vectors that normalize() leaves at zero, or short
        qkv[0, 0, :2, 0] = 0 if dtype == torch.float16 or seed % 2 else 1e-14
    scale_H = torch.rand(H, generator=g) * 9 + 1 if scaled else None
    softmax_scale = 1.0 if scaled else D**-0.5
    k_before, v_before = (torch.randn(R, H, capacity, D, generator=g).to(dtype) for _ in range(2))
    q, k, v = qkv.double()[torch.arange(R).clamp_max(S - 1)].unbind(2)
    if scaled:
        q, k = F.normalize(q, dim=-1) * scale_H.double().view(-1, 1), F.normalize(k, dim=-1)
    k_cache, v_cache = ops.place(k_before), ops.place(v_before)
    scales = ops.place(scale_H) if scaled else None
    out = ops.qk_norm(ops.place(qkv), scales, softmax_scale, R, k_cache, v_cache, begin)
    assert_close(out, q * softmax_scale, BOUNDS[dtype])
    expected_k, expected_v = k_before.double(), v_before.double()
    expected_k[:, :, begin : begin + l] = k.transpose(1, 2)
    expected_v[:, :, begin : begin + l] = v.transpose(1, 2)
    assert_close(k_cache, expected_k, BOUNDS[dtype])
    assert torch.equal(v_cache.cpu().double(), expected_v)
    assert torch.equal(k_cache.cpu()[:, :, :begin], k_before[:, :, :begin])  # what was cached stays
    assert torch.equal(k_cache.cpu()[:, :, begin + l :], k_before[:, :, begin + l :])


def check_scale_attention(ops: Operators, dtype, R, l, H, D, length, capacity, sharpness=1.0, seed=0):
    g = generator(seed)
    q = (torch.randn(R, l, H, D, generator=g) * sharpness * D**-0.5).to(dtype)
    caches = torch.randn(2, R, H, capacity, D, generator=g).to(dtype)
    caches[:, :, :, length:] = float("nan")  # not there yet: must not be looked at
    k, v = caches.double()[:, :, :, :length]
    weights = (q.double().transpose(1, 2) @ k.transpose(-1, -2)).softmax(dim=-1)
    out = ops.scale_attention(ops.place(q), ops.place(caches[0]), ops.place(caches[1]), length)
    # weights are rounded to the type before the second product
    assert_close(out, (weights @ v).transpose(1, 2), {**BOUNDS, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype])
    return out


def token_logits(kind: str, B, l, V, seed) -> torch.Tensor:
    g = generator(seed)
    logits = torch.randn(B, l, V, generator=g) * 3
    if kind == "ties":  # as the head in bfloat16 makes them, and coarser
        return logits.bfloat16().float() if seed % 2 else logits.round()
    if kind == "equal":
        return torch.full((B, l, V), float(seed % 7 - 3))
    if kind == "wide":  # most weights underflow; some logits beyond float32's range of differences
        return logits * torch.tensor([1e-38, 1.0, 200.0, 1e4, 1e37])[torch.randint(5, (B, l, V), generator=g)]
    if kind == "outlier":
        logits[..., 0] += 1e6
        return logits * 1e-3
    if kind == "zeros":  # of both signs
        return torch.where(logits > 0, 0.0, -0.0)
    if kind == "tiny":  # denormal differences
        return (logits * 100).round() * 1.4e-45
    assert kind == "normal"
    return logits


def check_draw_tokens(ops: Operators, B, l, V, top_k, top_p, kind="normal", scale=3, seed=0):
    logits = token_logits(kind, B, l, V, seed)
    seeds = torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator(seed + 1))
    expected = sample_tokens_reference(logits.double(), None, 0.0, top_k, top_p, seeds, scale)
    bad = ops.place(torch.zeros(scale + 1, B, dtype=torch.int32))
    idx = ops.draw_tokens(ops.place(logits), ops.place(seeds), scale, top_k, top_p, bad)
    assert torch.equal(idx.cpu(), expected)
    assert not bad.any()
    return idx


def check_draw_tokens_close_calls(ops: Operators, l=64, scale=2):
    seed = torch.tensor([7])
    for margin, winner in ((1e-11, 0), (-1e-11, 1)):
        logits = photo_finishes(7, scale, l, margin)
        bad = ops.place(torch.zeros(scale + 1, 1, dtype=torch.int32))
        idx = ops.draw_tokens(ops.place(logits), ops.place(seed), scale, 0, 0.0, bad)
        assert idx.unique().tolist() == [winner]


def check_draw_tokens_not_finite(ops: Operators, bad_value):
    B, l, V, scale = 3, 2, 50, 1
    logits = torch.randn(B, l, V, generator=generator(0))
    logits[1, 1, 49] = bad_value
    bad = ops.place(torch.zeros(scale + 2, B, dtype=torch.int32))
    idx = ops.draw_tokens(ops.place(logits), ops.place(torch.arange(B)), scale, 10, 0.9, bad)
    expected = torch.zeros(scale + 2, B, dtype=torch.int32)
    expected[scale, 1] = 1
    assert torch.equal(bad.cpu(), expected)
    assert idx[1, 1] == 0 and (idx >= 0).all()


def check_pyramid_update(ops: Operators, B, C, h, pn, pn_next, V=50, phi=True, codes=False, seed=0):
    g = generator(seed)
    codebook = torch.randn(V, C, generator=g)
    idx = torch.randint(V, (B, pn * pn), generator=g)
    weight, bias = torch.randn(C, C, 3, 3, generator=g) / (3 * C**0.5), torch.randn(C, generator=g)
    ratio = 0.5 if phi else 0.0
    f_hat = torch.randn(B, C, h, h, generator=g)
    phi_double = (weight.double(), bias.double()) if phi else (None, None)
    expected_f_hat = f_hat.double()
    tokens, table = idx, codebook
    if codes:  # mixtures: as if each were a code of its own
        table = torch.rand(B * pn * pn, V, generator=g).softmax(dim=-1) @ codebook * 5
        tokens = torch.arange(B * pn * pn).view(B, -1)
    expected = pyramid_update_reference(tokens, table.double(), *phi_double, ratio, expected_f_hat, pn, max(pn_next, 1))
    f_hat = ops.place(f_hat)
    next_map = ops.pyramid_update(
        ops.place(table.view(B, -1, C) if codes else idx),
        None if codes else ops.place(codebook),
        ops.place(weight) if phi else None,
        ops.place(bias) if phi else None,
        ratio,
        f_hat,
        pn,
        pn_next,
    )
    assert_close(f_hat, expected_f_hat, 1e-6)
    if pn_next:
        assert_close(next_map, expected.flatten(2).transpose(1, 2), 1e-6)
    return next_map


def check_group_norm_silu(ops: Operators, dtype, B, hw, C, groups, silu=True, y_dtype=None, mean=0.0, seed=0):
    g = generator(seed)
    x = (torch.randn(B, hw, C, generator=g) + mean).to(dtype)
    weight, bias = torch.randn(2, C, generator=g)
    y_dtype = y_dtype or dtype
    expected = F.group_norm(x.double().transpose(1, 2), groups, weight.double(), bias.double(), 1e-6).transpose(1, 2)
    if silu:
        expected = F.silu(expected)
    x, weight, bias = ops.place(x), ops.place(weight), ops.place(bias)
    scratch = ops.group_norm_silu_scratch(x, groups)
    y = ops.group_norm_silu(x, weight, bias, groups, 1e-6, silu, y_dtype, scratch)
    # a mean far off costs digits of x - mean in float32
    assert_close(y, expected, BOUNDS[y_dtype] + abs(mean) * 2e-7)
    # the scratch is as it was
    other = ops.place(x.flip(0).flip(1) * 2 + 1)
    after = ops.group_norm_silu(other, weight, bias, groups, 1e-6, silu, y_dtype, scratch)
    assert torch.equal(after, ops.group_norm_silu(other, weight, bias, groups, 1e-6, silu, y_dtype))
    return y


def check_group_norm_silu_of_a_sum(ops: Operators, dtype, B, hw, C, groups, residual, store=True, seed=0):
    """x + bias (+ residual), stored or not."""
    g = generator(seed)
    x, other = torch.randn(2, B, hw, C, generator=g).to(dtype)
    weight, bias, x_bias = torch.randn(3, C, generator=g)
    total = x.double() + x_bias.double() + (other.double() if residual else 0)
    normed = total.to(dtype).double() if store else total
    norm = F.group_norm(normed.transpose(1, 2), groups, eps=1e-6).transpose(1, 2)
    expected = F.silu(norm * weight.double() + bias.double())
    placed = ops.place(x)
    stored = ops.empty(B, hw, C, dtype=dtype) if store else None
    before = (ops.place(x_bias), ops.place(other) if residual else None, stored)
    y = ops.group_norm_silu(placed, ops.place(weight), ops.place(bias), groups, 1e-6, True, dtype, before=before)
    if store:
        assert_close(stored, total, BOUNDS[dtype])
    assert_close(y, expected, BOUNDS[dtype])
    assert torch.equal(placed.cpu(), x)
    return y


def check_add_bias_residual(ops: Operators, dtype, N, C, bias, residual, seed=0):
    g = generator(seed)
    x, other = torch.randn(2, N, C, generator=g).to(dtype)
    row = torch.randn(C, generator=g)
    expected = x.double() + (row.double() if bias else 0) + (other.double() if residual else 0)
    y = ops.add_bias_residual(ops.place(x), ops.place(row) if bias else None, ops.place(other) if residual else None)
    assert_close(y, expected, BOUNDS[dtype])


def check_weave_phases(ops: Operators, dtype, B, h, w, C, seed=0):
    g = generator(seed)
    phases, bias = torch.randn(B, h + 1, w + 1, 4, C, generator=g).to(dtype), torch.randn(C, generator=g)
    expected = torch.empty(B, 2 * h, 2 * w, C, dtype=torch.float64)
    for a in range(2):
        for b in range(2):
            expected[:, a::2, b::2] = phases[:, a : a + h, b : b + w, 2 * a + b].double()
    assert_close(ops.weave_phases(ops.place(phases), ops.place(bias)), expected + bias.double(), BOUNDS[dtype])


def check_image_of_taps(ops: Operators, B, h, w, C=40, seed=0):
    """With the product that makes the taps: the last convolution of the decoder."""
    g = generator(seed)
    x, weight, bias = torch.randn(B, C, h, w, generator=g), torch.randn(3, C, 3, 3, generator=g) * 0.05, torch.rand(3)
    taps = x.permute(0, 2, 3, 1) @ tap_weights(weight).t()
    expected = (F.conv2d(x.double(), weight.double(), bias.double(), padding=1).clamp(-1, 1) + 1) / 2
    assert_close(ops.image_of_taps(ops.place(taps), ops.place(bias)), expected, BOUNDS[torch.float32])


def check_skinny_linear(ops: Operators, dtype, M, N, K, gelu=False, bias=True, float_out=False, seed=0):
    g = generator(seed)
    x, weight = torch.randn(M, K, generator=g).to(dtype), (torch.randn(N, K, generator=g) * K**-0.5).to(dtype)
    y_dtype = torch.float32 if float_out else dtype
    row = torch.randn(N, generator=g).to(y_dtype) if bias else None
    expected = F.linear(x.double(), weight.double(), row.double() if bias else None)
    if gelu:
        expected = F.gelu(expected, approximate="tanh")
    y = ops.skinny_linear(ops.place(x), ops.place(weight), ops.place(row) if bias else None, gelu, y_dtype)
    assert_close(y, expected, BOUNDS[y_dtype])
    return y


def check_gelu(ops: Operators, dtype, n, seed=0):
    x = (torch.randn(n, generator=generator(seed)) * 4).to(dtype)
    expected = F.gelu(x.double(), approximate="tanh")
    assert_close(ops.gelu(ops.place(x)), expected, BOUNDS[dtype])


def check_transformer_blocks(
    ops: Operators, dtype, S, R, l, H, hidden, begin=0, depth=2, scaled=True, biases=True, seed=0
):
    g, D, eps, softmax_scale = generator(seed), 64, 1e-6, 1.0 if scaled else 0.125
    C, capacity, M = H * D, begin + l + 3, max(S - 1, 1)

    def weights(out, into):
        bias = torch.randn(out, generator=g).to(dtype) if biases else None
        return (torch.randn(out, into, generator=g) / into**0.5).to(dtype), bias

    blocks = []
    for _ in range(depth):
        shapes = ((3 * C, C), (C, C), (hidden, C), (C, hidden))
        scale_H = torch.rand(H, generator=g) * 5 + 1 if scaled else None
        linears = [tensor for shape in shapes for tensor in weights(*shape)]
        blocks.append([*linears, scale_H, torch.randn(M, 6, C, generator=g)])
    x = torch.randn(S, l, C, generator=g) * 2
    before = torch.randn(depth, 2, R, H, capacity, D, generator=g).to(dtype)
    rows = torch.arange(S).clamp_max(M - 1)

    expected, expected_caches = x.double(), before.double()
    for block, (keys, values) in zip(blocks, expected_caches):
        qkv_w, qkv_b, proj_w, proj_b, fc1_w, fc1_b, fc2_w, fc2_b, scale_H, modulation = (
            None if tensor is None else tensor.double() for tensor in block
        )
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation[rows].unsqueeze(2).unbind(1)
        y = F.layer_norm(expected, (C,), eps=eps) * (1 + scale1) + shift1
        q, k, v = F.linear(y, qkv_w, qkv_b).view(S, l, 3, H, D).permute(2, 0, 3, 1, 4)
        if scaled:
            q, k = F.normalize(q, dim=-1) * scale_H.view(-1, 1, 1), F.normalize(k, dim=-1)
        for cache, new in ((keys, k), (values, v)):
            cache[:, :, begin : begin + l] = new[torch.arange(R).clamp_max(S - 1)]
        length = begin + l
        scores = q @ keys[:S, :, :length].transpose(2, 3) * softmax_scale
        attended = (scores.softmax(-1) @ values[:S, :, :length]).transpose(1, 2).reshape(S, l, C)
        expected = expected + gate1 * F.linear(attended, proj_w, proj_b)
        y = F.layer_norm(expected, (C,), eps=eps) * (1 + scale2) + shift2
        expected = expected + gate2 * F.linear(F.gelu(F.linear(y, fc1_w, fc1_b), approximate="tanh"), fc2_w, fc2_b)

    placed = [[None if tensor is None else ops.place(tensor) for tensor in block] for block in blocks]
    caches = [(ops.place(keys), ops.place(values)) for keys, values in before]
    out = ops.transformer_blocks(ops.place(x), placed, caches, begin, eps, softmax_scale, hidden)
    # seven roundings to the type in a row, of values that products mix, and twice that in two blocks
    bound = 4 * BOUNDS[dtype]
    assert_close(out, expected, bound)
    for pair, originals, wanted in zip(caches, before, expected_caches):
        for cache, original, values in zip(pair, originals, wanted):
            assert_close(cache[:, :, begin : begin + l], values[:, :, begin : begin + l], bound)
            kept = torch.cat((cache.cpu()[:, :, :begin], cache.cpu()[:, :, begin + l :]), 2)
            assert torch.equal(kept, torch.cat((original[:, :, :begin], original[:, :, begin + l :]), 2))
    return out
