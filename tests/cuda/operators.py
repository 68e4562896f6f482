"""The operators of csrc/cuda on tensors: one interface to the kernels on a GPU and to the same kernels on the CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Operators(ABC):
    """Results are filled with NaN (or -1) before a kernel runs, so that an element it leaves out is seen."""

    @abstractmethod
    def call(self, name, *arguments):
        """Runs an operator; raises RuntimeError with its message."""

    @abstractmethod
    def size(self, name, *arguments) -> int:
        """The answer of a `..._scratch_bytes` function."""

    @abstractmethod
    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy where the kernels can reach it."""

    def empty(self, *shape, dtype=torch.float32):
        return self.place(torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype))

    def residual_adaln_modulate(self, x_RLC, branch_RLC, gate_MC, scale_MC, shift_MC, stride, eps, y_dtype):
        """x_RLC is changed in place; gate, scale and shift may be views of rows `stride` floats apart."""
        R, L, C = x_RLC.shape
        y_RLC = self.empty(R, L, C, dtype=y_dtype)
        branch_type = TYPES[torch.float32 if branch_RLC is None else branch_RLC.dtype]
        parameters = (gate_MC, scale_MC, shift_MC, stride, scale_MC.shape[0])
        self.call(
            "residual_adaln_modulate",
            *(x_RLC, branch_RLC, branch_type, *parameters, R, L, C, float(eps), y_RLC, TYPES[y_dtype]),
        )
        return y_RLC

    def qk_norm(self, qkv_Sl3HD, scale_H, softmax_scale, R, k_cache_RHcD, v_cache_RHcD, begin):
        """The caches are written in place."""
        S, l, _, H, D = qkv_Sl3HD.shape
        q_RlHD = self.empty(R, l, H, D, dtype=qkv_Sl3HD.dtype)
        caches = (k_cache_RHcD, v_cache_RHcD, begin, k_cache_RHcD.shape[2])
        type_ = TYPES[qkv_Sl3HD.dtype]
        self.call("qk_norm", qkv_Sl3HD, type_, scale_H, float(softmax_scale), S, R, l, H, D, q_RlHD, *caches)
        return q_RlHD

    def scale_attention(self, q_RlHD, k_cache_RHcD, v_cache_RHcD, length):
        R, l, H, D = q_RlHD.shape
        out_RlHD = self.empty(R, l, H, D, dtype=q_RlHD.dtype)
        scratch = self.empty(self.size("scale_attention_scratch_bytes", R, l, H, D, length), dtype=torch.int8)
        sizes = (R, l, H, D, length, k_cache_RHcD.shape[2])
        self.call("scale_attention", q_RlHD, k_cache_RHcD, v_cache_RHcD, TYPES[q_RlHD.dtype], *sizes, out_RlHD, scratch)
        return out_RlHD

    def draw_tokens(self, logits_BlV, seeds_B, scale, top_k, top_p, bad_SB):
        """bad_SB is written in place."""
        B, l, V = logits_BlV.shape
        idx_Bl = self.empty(B, l, dtype=torch.int64)
        self.call("draw_tokens", logits_BlV, seeds_B, scale, B, l, V, top_k, float(top_p), idx_Bl, bad_SB)
        return idx_Bl

    def pyramid_update(self, tokens, codebook_VC, phi_weight, phi_bias, phi_ratio, f_hat_BChw, pn, pn_next):
        """`tokens`: idx (B, l) or codes (B, l, C). f_hat_BChw is changed in place."""
        B, C, h, w = f_hat_BChw.shape
        given = (None, tokens) if tokens.is_floating_point() else (tokens, None)
        next_BlC = self.empty(B, pn_next * pn_next, C)
        phi = (phi_weight, phi_bias, float(phi_ratio))
        self.call("pyramid_update", *given, codebook_VC, *phi, f_hat_BChw, B, C, h, w, pn, pn_next, next_BlC)
        return next_BlC

    def group_norm_silu(self, x_BlC, weight_C, bias_C, groups, eps, silu, y_dtype, scratch=None, before=(None,) * 3):
        """`before`: x_bias_C, residual_BlC and the tensor that gets the sum."""
        B, l, C = x_BlC.shape
        y_BlC = self.empty(B, l, C, dtype=y_dtype)
        if scratch is None:
            scratch = self.group_norm_silu_scratch(x_BlC, groups)
        sizes = (B, l, C, groups, float(eps), int(silu))
        types = TYPES[x_BlC.dtype], TYPES[y_dtype]
        self.call("group_norm_silu", x_BlC, types[0], *before, weight_C, bias_C, *sizes, y_BlC, types[1], scratch)
        return y_BlC

    def group_norm_silu_scratch(self, x_BlC, groups):
        size = self.size("group_norm_silu_scratch_bytes", *x_BlC.shape, groups)
        return self.place(torch.zeros(size, dtype=torch.int8))

    def skinny_linear(self, x_MK, weight_NK, bias_N, gelu, y_dtype):
        (M, K), N = x_MK.shape, len(weight_NK)
        y_MN = self.empty(M, N, dtype=y_dtype)
        ends = (M, N, K, int(gelu), y_MN, int(y_dtype == torch.float32))
        self.call("skinny_linear", x_MK, weight_NK, TYPES[x_MK.dtype], bias_N, *ends)
        return y_MN

    def add_bias_residual(self, x_NC, bias_C, residual_NC):
        y_NC = self.empty(*x_NC.shape, dtype=x_NC.dtype)
        self.call("add_bias_residual", x_NC, TYPES[x_NC.dtype], bias_C, residual_NC, *x_NC.shape, y_NC)
        return y_NC

    def weave_phases(self, phases_Bhw4C, bias_C):
        B, h, w, _, C = phases_Bhw4C.shape
        y_BhwC = self.empty(B, 2 * h - 2, 2 * w - 2, C, dtype=phases_Bhw4C.dtype)
        self.call("weave_phases", phases_Bhw4C, TYPES[phases_Bhw4C.dtype], bias_C, B, h - 1, w - 1, C, y_BhwC)
        return y_BhwC

    def image_of_taps(self, taps_BhwS, bias_C):
        B, h, w, S = taps_BhwS.shape
        image_B3hw = self.empty(B, 3, h, w)
        self.call("image_of_taps", taps_BhwS, bias_C, B, h, w, S, image_B3hw)
        return image_B3hw

    def gelu(self, x):
        """In place."""
        self.call("gelu", x, TYPES[x.dtype], x.numel())
        return x

    def transformer_blocks(self, x_SlC, blocks, caches, begin, eps, softmax_scale, hidden):
        """x_SlC and the caches, a pair (R, H, capacity, D) a block, are changed in place. `blocks`: of each block what
        TransformerBlock names but the caches, placed, or None."""
        (S, l, C), (R, H, capacity, _) = x_SlC.shape, caches[0][0].shape
        dtype, modulation_M6C = caches[0][0].dtype, blocks[0][-1]
        rows = [[0 if t is None else t.data_ptr() for t in (*block, *pair)] for block, pair in zip(blocks, caches)]
        sizes = (len(blocks), len(modulation_M6C), S, R, l, H, hidden, begin, capacity)
        buffers = [self.empty(n, l, width, dtype=dtype) for n, width in ((S, C), (R, C), (S, C), (S, hidden))]
        partial = self.empty(self.size("transformer_blocks_partial_floats", S, l, H, hidden))
        barrier = self.place(torch.zeros(1, dtype=torch.int32))
        numbers = (float(eps), float(softmax_scale))
        table = self.place(torch.tensor(rows))
        self.call("transformer_blocks", table, TYPES[dtype], *sizes, *numbers, x_SlC, *buffers, partial, barrier)
        return x_SlC
