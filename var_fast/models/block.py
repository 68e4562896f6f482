"""AdaLNSelfAttn: one transformer block, and its parts (VAR section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from var_fast.models.drop_path import DropPath
from var_fast.models.kv_cache import KVCache
from var_fast.ops import adaln_modulate, gelu, qk_norm, residual_adaln_modulate, scale_attention

MAX_LOG_SCALE = math.log(100)

Modulation = tuple[torch.Tensor, ...]
"""gate 1, gate 2, scale 1, scale 2, shift 1, shift 2 of a block, each (B, C): 1 for attention, 2 for the FFN."""

Pending = tuple[torch.Tensor, torch.Tensor]
"""(branch (B, L, C), gate (B, C)): gate * branch is still to be added to x. The next norm does it in one pass."""


def settle(x_BLC: torch.Tensor, pending: Pending | None) -> torch.Tensor:
    """x with what is pending added."""
    return x_BLC if pending is None else x_BLC + pending[0] * pending[1].unsqueeze(1)


class SharedAdaLin(nn.Linear):
    """Condition (B, D) -> (B, 1, 6, C): the modulation that all blocks share (`shared_aln`)."""

    def forward(self, cond_BD: torch.Tensor) -> torch.Tensor:
        return super().forward(cond_BD).view(-1, 1, 6, self.out_features // 6)


class FFN(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        drop: float = 0.0,
        fused_if_available: bool = True,
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop) if drop > 0 else nn.Identity()
        self.backend = "auto" if fused_if_available else "reference"

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(gelu(self.fc1(x_BLC), backend=self.backend)))


class SelfAttention(nn.Module):
    """Multi-head self-attention. `attn_l2_norm`: queries and keys at unit length times a learned scale per head (at
    most 100); otherwise scores are scaled by 0.25 / sqrt(head_dim)."""

    def __init__(
        self,
        block_idx: int,
        embed_dim: int = 768,
        num_heads: int = 12,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_l2_norm: bool = False,
        flash_if_available: bool = True,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim is {embed_dim}, expected a multiple of num_heads = {num_heads}")
        self.block_idx, self.num_heads, self.head_dim = block_idx, num_heads, embed_dim // num_heads
        self.attn_l2_norm, self.attn_drop = attn_l2_norm, attn_drop
        self.backend = "auto" if flash_if_available else "reference"
        if attn_l2_norm:
            self.scale = 1.0
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(embed_dim)), nn.Parameter(torch.zeros(embed_dim))
        self.register_buffer("zero_k_bias", torch.zeros(embed_dim))
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0 else nn.Identity()
        self._cache: KVCache | None = None

    def kv_caching(self, enable: bool) -> None:
        """Keep keys and values of the calls to come, or drop what was kept."""
        self._cache = KVCache() if enable else None

    def forward(
        self,
        x: torch.Tensor,
        attn_bias: torch.Tensor | None,
        *,
        patch_nums: Sequence[int] | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """x (B, L, C) -> (B, L, C).

        `patch_nums`: the block-causal mask of these scales; else `attn_bias` (1, 1, L, L) is added to the scores; else
        every token sees every other, and all those of earlier calls with the same `cache` (or under kv_caching).
        """
        B, L, C = x.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv_BL3HD = F.linear(x, self.mat_qkv.weight, bias).view(B, L, 3, self.num_heads, self.head_dim)
        scale_H = self.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp().view(-1) if self.attn_l2_norm else None
        q_BLHD, k_BLHD, v_BLHD = qk_norm(qkv_BL3HD, scale_H, backend=self.backend)
        if self.attn_l2_norm:  # the norm is done in float32 under autocast; the products go back to the half type
            q_BLHD, k_BLHD = q_BLHD.to(qkv_BL3HD.dtype), k_BLHD.to(qkv_BL3HD.dtype)
        cache = cache or self._cache
        if cache is not None:
            k_BLHD, v_BLHD = cache.append(k_BLHD, v_BLHD)
        dropout = self.attn_drop if self.training else 0.0
        if patch_nums is not None and dropout == 0:
            o_BLHD = scale_attention(q_BLHD, k_BLHD, v_BLHD, patch_nums, self.scale, backend=self.backend)
        else:
            o_BLHD = F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q_BLHD, k_BLHD, v_BLHD)),
                attn_mask=None if attn_bias is None else attn_bias.to(q_BLHD.dtype),
                dropout_p=dropout,
                scale=self.scale,
            ).transpose(1, 2)
        return self.proj_drop(self.proj(o_BLHD.reshape(B, L, C)))

    def extra_repr(self) -> str:
        return f"attn_l2_norm={self.attn_l2_norm}"


class AdaLNSelfAttn(nn.Module):
    """x += gate 1 * attention(modulate(LN(x))); x += gate 2 * FFN(modulate(LN(x)))."""

    def __init__(
        self,
        block_idx: int,
        last_drop_p: float,
        embed_dim: int,
        cond_dim: int,
        shared_aln: bool,
        norm_layer: Callable[..., nn.Module],
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        attn_l2_norm: bool = False,
        flash_if_available: bool = False,
        fused_if_available: bool = True,
    ):
        super().__init__()
        self.block_idx, self.last_drop_p = block_idx, last_drop_p
        self.C, self.D, self.shared_aln = embed_dim, cond_dim, shared_aln
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.attn = SelfAttention(
            block_idx=block_idx,
            embed_dim=embed_dim,
            num_heads=num_heads,
            attn_drop=attn_drop,
            proj_drop=drop,
            attn_l2_norm=attn_l2_norm,
            flash_if_available=flash_if_available,
        )
        self.ffn = FFN(embed_dim, round(embed_dim * mlp_ratio), drop=drop, fused_if_available=fused_if_available)
        self.ln_wo_grad = norm_layer(embed_dim, elementwise_affine=False)
        self.norm_backend = "auto" if fused_if_available else "reference"
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, embed_dim) / embed_dim**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 6 * embed_dim))

    def modulation(self, cond_BD: torch.Tensor) -> Modulation:
        """This block's gates, scales and shifts for a condition (B, D), or for the shared modulation (B, 1, 6, C)."""
        six_B6C = (self.ada_gss + cond_BD).squeeze(1) if self.shared_aln else self.ada_lin(cond_BD).view(-1, 6, self.C)
        return six_B6C.unbind(1)

    def forward(
        self,
        x: torch.Tensor,
        cond_BD: torch.Tensor,
        attn_bias: torch.Tensor | None,
        *,
        patch_nums: Sequence[int] | None = None,
        pending: Pending | None = None,
        defer: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, Pending]:
        """x (B, L, C) -> (B, L, C); `attn_bias` and `patch_nums` as in SelfAttention.

        `pending`: what the block before has left to add to x. `defer`: the result is (x, what this one leaves).
        """
        modulation = tuple(m_BC.expand(x.shape[0], -1) for m_BC in self.modulation(cond_BD))
        x, pending = self.forward_modulated(x, modulation, attn_bias, patch_nums=patch_nums, pending=pending)
        return (x, pending) if defer else settle(x, pending)

    def forward_modulated(
        self,
        x_BLC: torch.Tensor,
        modulation: Modulation,
        attn_bias: torch.Tensor | None = None,
        *,
        patch_nums: Sequence[int] | None = None,
        cache: KVCache | None = None,
        pending: Pending | None = None,
    ) -> tuple[torch.Tensor, Pending]:
        """The block where its modulation is known already (sampling: it is the same at every scale), deferred."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation
        norm = dict(eps=self.ln_wo_grad.eps, backend=self.norm_backend)
        if pending is None:
            y_BLC = adaln_modulate(x_BLC, scale1, shift1, **norm)
        else:
            x_BLC, y_BLC = residual_adaln_modulate(x_BLC, *pending, scale1, shift1, **norm)
        y_BLC = self.attn(y_BLC, attn_bias, patch_nums=patch_nums, cache=cache)
        x_BLC, y_BLC = residual_adaln_modulate(x_BLC, y_BLC, self.drop_path(gate1), scale2, shift2, **norm)
        return x_BLC, (self.ffn(y_BLC), self.drop_path(gate2))

    def extra_repr(self) -> str:
        return f"shared_aln={self.shared_aln}"


class AdaLNBeforeHead(nn.Module):
    """The last modulated norm."""

    def __init__(self, C: int, D: int, norm_layer: Callable[..., nn.Module]):
        super().__init__()
        self.C, self.D = C, D
        self.norm_backend = "auto"
        self.ln_wo_grad = norm_layer(C, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * C))

    def forward(self, x_BLC: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        scale_BC, shift_BC = self.ada_lin(cond_BD).view(-1, 2, self.C).expand(x_BLC.shape[0], -1, -1).unbind(1)
        return adaln_modulate(x_BLC, scale_BC, shift_BC, self.ln_wo_grad.eps, backend=self.norm_backend)
