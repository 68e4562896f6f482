"""Convolutional encoder and decoder of the tokenizer (the VQGAN design; VAR section 3.1 and appendix)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from var_fast.ops import group_norm_silu

GROUPS = 32


def _norm(channels: int) -> nn.GroupNorm:
    if channels % GROUPS:
        raise ValueError(f"{channels} channels, expected a multiple of {GROUPS}: choose ch accordingly")
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def _conv3x3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel_size=3, padding=1)


def _norm_silu(norm: nn.GroupNorm, x_BChw: torch.Tensor) -> torch.Tensor:
    return group_norm_silu(x_BChw, norm.weight, norm.bias, norm.num_groups, norm.eps)


class Upsample2x(nn.Module):
    def __init__(self, in_channels: int):
        super().__init__()
        self.conv = _conv3x3(in_channels, in_channels)

    def forward(self, x_BChw):
        return self.conv(F.interpolate(x_BChw, scale_factor=2, mode="nearest"))


class Downsample2x(nn.Module):
    def __init__(self, in_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, kernel_size=3, stride=2)

    def forward(self, x_BChw):
        return self.conv(F.pad(x_BChw, (0, 1, 0, 1)))  # one row below and one column right: the even sizes halve


class ResnetBlock(nn.Module):
    def __init__(self, *, in_channels: int, out_channels: int | None = None, dropout: float):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.norm1 = _norm(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout) if dropout > 1e-6 else nn.Identity()
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x_BChw):
        h_BChw = self.conv1(_norm_silu(self.norm1, x_BChw))
        h_BChw = self.conv2(self.dropout(_norm_silu(self.norm2, h_BChw)))
        return self.nin_shortcut(x_BChw) + h_BChw


class AttnBlock(nn.Module):
    """One-head self-attention over the pixels of the lowest resolution."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.norm = _norm(in_channels)
        self.qkv = nn.Conv2d(in_channels, 3 * in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x_BChw):
        B, C, h, w = x_BChw.shape
        qkv_B3LC = self.qkv(self.norm(x_BChw)).reshape(B, 3, C, h * w).transpose(2, 3)
        o_BLC = F.scaled_dot_product_attention(*qkv_B3LC.unbind(1))
        return x_BChw + self.proj_out(o_BLC.transpose(1, 2).reshape(B, C, h, w))


class MidBlock(nn.Module):
    def __init__(self, channels: int, dropout: float, with_attention: bool):
        super().__init__()
        self.block_1 = ResnetBlock(in_channels=channels, dropout=dropout)
        self.attn_1 = AttnBlock(channels) if with_attention else nn.Identity()
        self.block_2 = ResnetBlock(in_channels=channels, dropout=dropout)

    def forward(self, x_BChw):
        return self.block_2(self.attn_1(self.block_1(x_BChw)))


class Level(nn.Module):
    """Residual blocks of one resolution; `attn` holds one attention per block, or none at all."""

    def __init__(self):
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()

    def forward(self, h_BChw):
        for i, block in enumerate(self.block):
            h_BChw = block(h_BChw)
            if len(self.attn):
                h_BChw = self.attn[i](h_BChw)
        return h_BChw


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> (B, z_channels, H / 2^(len(ch_mult) - 1), W / ...)."""

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        in_channels: int = 3,
        z_channels: int,
        using_sa: bool = True,
        using_mid_sa: bool = True,
    ):
        super().__init__()
        self.conv_in = _conv3x3(in_channels, ch)
        self.down = nn.ModuleList()
        width = ch
        for i, mult in enumerate(ch_mult):
            level, is_last = Level(), i == len(ch_mult) - 1
            for _ in range(num_res_blocks):
                level.block.append(ResnetBlock(in_channels=width, out_channels=ch * mult, dropout=dropout))
                width = ch * mult
                if is_last and using_sa:
                    level.attn.append(AttnBlock(width))
            if not is_last:
                level.downsample = Downsample2x(width)
            self.down.append(level)
        self.mid = MidBlock(width, dropout, using_mid_sa)
        self.norm_out = _norm(width)
        self.conv_out = _conv3x3(width, z_channels)

    def forward(self, x_BChw):
        h_BChw = self.conv_in(x_BChw)
        for i, level in enumerate(self.down):
            h_BChw = level(h_BChw)
            if i < len(self.down) - 1:
                h_BChw = level.downsample(h_BChw)
        return self.conv_out(_norm_silu(self.norm_out, self.mid(h_BChw)))


class Decoder(nn.Module):
    """Latent (B, z_channels, h, w) -> image (B, 3, h * 2^(len(ch_mult) - 1), w * ...)."""

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        in_channels: int = 3,
        z_channels: int,
        using_sa: bool = True,
        using_mid_sa: bool = True,
    ):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = _conv3x3(z_channels, width)
        self.mid = MidBlock(width, dropout, using_mid_sa)
        levels = []
        for i, mult in reversed(list(enumerate(ch_mult))):
            level = Level()
            for _ in range(num_res_blocks + 1):
                level.block.append(ResnetBlock(in_channels=width, out_channels=ch * mult, dropout=dropout))
                width = ch * mult
                if i == len(ch_mult) - 1 and using_sa:
                    level.attn.append(AttnBlock(width))
            if i > 0:
                level.upsample = Upsample2x(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # named from the highest resolution, run from the lowest
        self.norm_out = _norm(width)
        self.conv_out = _conv3x3(width, in_channels)

    def forward(self, z_BChw):
        h_BChw = self.mid(self.conv_in(z_BChw))
        for i, level in reversed(list(enumerate(self.up))):
            h_BChw = level(h_BChw)
            if i > 0:
                h_BChw = level.upsample(h_BChw)
        return self.conv_out(_norm_silu(self.norm_out, h_BChw))
