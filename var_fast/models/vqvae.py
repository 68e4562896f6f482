"""VQVAE: the multi-scale tokenizer (VAR section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from var_fast.hub import TokenizerHubMixin
from var_fast.models.autoencoder import Decoder, Encoder
from var_fast.models.quantizer import VectorQuantizer2


class VQVAE(TokenizerHubMixin, nn.Module):
    """Encoder, multi-scale quantizer, decoder. Images are (B, 3, H, W) in [-1, 1], H and W `downsample` times the
    largest of `v_patch_nums`.

    `ch` channels at full resolution, times `ch_mult` at each halving; `ch_mult` (1, 1, 2, 2, 4) is the published one
    (16x down-sampling); shorter ones make tokenizers for smaller images.
    """

    def __init__(
        self,
        vocab_size: int = 4096,
        z_channels: int = 32,
        ch: int = 128,
        dropout: float = 0.0,
        beta: float = 0.25,
        using_znorm: bool = False,
        quant_conv_ks: int = 3,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        test_mode: bool = True,
        *,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
    ):
        super().__init__()
        self.config: dict[str, Any] = dict(
            vocab_size=vocab_size,
            z_channels=z_channels,
            ch=ch,
            dropout=dropout,
            beta=beta,
            using_znorm=using_znorm,
            quant_conv_ks=quant_conv_ks,
            quant_resi=quant_resi,
            share_quant_resi=share_quant_resi,
            default_qresi_counts=default_qresi_counts,
            v_patch_nums=list(v_patch_nums),
            ch_mult=list(ch_mult),
        )
        self.test_mode = test_mode
        self.V = self.vocab_size = vocab_size
        self.Cvae = z_channels
        self.downsample = 2 ** (len(ch_mult) - 1)
        coder = dict(ch=ch, ch_mult=ch_mult, num_res_blocks=2, dropout=dropout, z_channels=z_channels)
        self.encoder = Encoder(**coder)
        self.decoder = Decoder(**coder)
        self.quantize = VectorQuantizer2(
            vocab_size=vocab_size,
            Cvae=z_channels,
            using_znorm=using_znorm,
            beta=beta,
            default_qresi_counts=default_qresi_counts,
            v_patch_nums=v_patch_nums,
            quant_resi=quant_resi,
            share_quant_resi=share_quant_resi,
        )
        self.quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, quant_conv_ks, padding=quant_conv_ks // 2)
        if test_mode:
            self.eval()
            self.requires_grad_(False)

    def forward(
        self, inp: torch.Tensor, ret_usages: bool = False
    ) -> tuple[torch.Tensor, list[float] | None, torch.Tensor]:
        """Training step: (reconstruction (B, 3, H, W), code use per scale in % or None, VQ loss)."""
        f_hat_BChw, usages, vq_loss = self.quantize(self.encode(inp), ret_usages=ret_usages)
        return self.decoder(self.post_quant_conv(f_hat_BChw)), usages, vq_loss

    def encode(self, img_B3HW: torch.Tensor) -> torch.Tensor:
        """The feature map (B, Cvae, h, w) that is quantized."""
        return self.quant_conv(self.encoder(img_B3HW))

    def fhat_to_img(self, f_hat: torch.Tensor) -> torch.Tensor:
        """Image (B, 3, H, W) in [-1, 1] of a sum of token maps (B, Cvae, h, w)."""
        if f_hat.device.type == "cpu":
            # The whole decoder follows this layout; its convolutions are 8% faster so (256 px, float32, AVX2).
            f_hat = f_hat.contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(f_hat)).clamp_(-1, 1).contiguous()

    @torch.no_grad()
    def img_to_idxBl(
        self, inp_img_no_grad: torch.Tensor, v_patch_nums: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Tokens (B, pn * pn) int64 of every scale."""
        return self.quantize.f_to_idxBl_or_fhat(self.encode(inp_img_no_grad), to_fhat=False, v_patch_nums=v_patch_nums)

    def idxBl_to_img(
        self, ms_idx_Bl: list[torch.Tensor], same_shape: bool, last_one: bool = False
    ) -> list[torch.Tensor] | torch.Tensor:
        """Image of tokens (B, l): after every scale, or with `last_one` the final one only.

        `same_shape`: all images at full size; otherwise each at its scale's own size.
        """
        maps = []
        for idx_Bl in ms_idx_Bl:
            pn = round(idx_Bl.shape[1] ** 0.5)
            maps.append(self.quantize.tokens_to_map(idx_Bl, pn))
        return self.embed_to_img(maps, all_to_max_scale=same_shape, last_one=last_one)

    def embed_to_img(
        self, ms_h_BChw: list[torch.Tensor], all_to_max_scale: bool, last_one: bool = False
    ) -> list[torch.Tensor] | torch.Tensor:
        """As `idxBl_to_img`, from the looked-up codes (B, Cvae, pn, pn) of every scale."""
        f_hat = self.quantize.embed_to_fhat(ms_h_BChw, all_to_max_scale=all_to_max_scale, last_one=last_one)
        return self.fhat_to_img(f_hat) if last_one else [self.fhat_to_img(f) for f in f_hat]

    def img_to_reconstructed_img(
        self, x: torch.Tensor, v_patch_nums: Sequence[int] | None = None, last_one: bool = False
    ) -> list[torch.Tensor] | torch.Tensor:
        """Image -> tokens -> image in [-1, 1]: after every scale, or with `last_one` the final one only."""
        f_hats = self.quantize.f_to_idxBl_or_fhat(self.encode(x), to_fhat=True, v_patch_nums=v_patch_nums)
        return self.fhat_to_img(f_hats[-1]) if last_one else [self.fhat_to_img(f) for f in f_hats]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As nn.Module's; code-use statistics of another number of scales are no reason to refuse a checkpoint."""
        name = "quantize.ema_vocab_hit_SV"
        own = self.quantize.ema_vocab_hit_SV
        if name in state_dict and state_dict[name].shape[0] != own.shape[0]:
            state_dict = {**state_dict, name: own}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
