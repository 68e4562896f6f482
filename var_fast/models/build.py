"""Tokenizer and transformer of one family, as the published training and sampling scripts build them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from var_fast.models.var import VAR
from var_fast.models.vqvae import VQVAE


def build_vae_var(
    device: str | torch.device,
    patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    V: int = 4096,
    Cvae: int = 32,
    ch: int = 160,
    share_quant_resi: int = 4,
    num_classes: int = 1000,
    depth: int = 16,
    shared_aln: bool = False,
    attn_l2_norm: bool = True,
    flash_if_available: bool = True,
    fused_if_available: bool = True,
    init_adaln: float = 0.5,
    init_adaln_gamma: float = 1e-5,
    init_head: float = 0.02,
    init_std: float = -1,
) -> tuple[VQVAE, VAR]:
    """A frozen tokenizer and an initialised transformer of `depth` blocks, `depth` heads and width 64 * depth on
    `device`.

    Drop path grows with depth, 0.1 * depth / 24, and `init_std` < 0 means sqrt(1 / (3 width)) (VAR section 3.2,
    appendix).
    """
    vae = VQVAE(
        vocab_size=V,
        z_channels=Cvae,
        ch=ch,
        test_mode=True,
        share_quant_resi=share_quant_resi,
        v_patch_nums=patch_nums,
    ).to(device)
    var = VAR(
        vae_local=vae,
        num_classes=num_classes,
        depth=depth,
        embed_dim=64 * depth,
        num_heads=depth,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.1 * depth / 24,
        norm_eps=1e-6,
        shared_aln=shared_aln,
        cond_drop_rate=0.1,
        attn_l2_norm=attn_l2_norm,
        patch_nums=patch_nums,
        flash_if_available=flash_if_available,
        fused_if_available=fused_if_available,
    ).to(device)
    var.init_weights(init_adaln=init_adaln, init_adaln_gamma=init_adaln_gamma, init_head=init_head, init_std=init_std)
    return vae, var
