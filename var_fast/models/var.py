"""VAR: the transformer that predicts an image scale by scale (VAR section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from var_fast.errors import UserError
from var_fast.hub import TransformerHubMixin
from var_fast.models.block import AdaLNBeforeHead, AdaLNSelfAttn, SharedAdaLin, settle
from var_fast.models.kv_cache import KVCache
from var_fast.models.published_draws import gumbel_softmax_with_rng, sample_with_top_k_top_p_, smoothing
from var_fast.models.vqvae import VQVAE
from var_fast.ops import scale_cross_entropy

Draw = Callable[[int, torch.Tensor, torch.Tensor | None, float], tuple[torch.Tensor, torch.Tensor | None]]
"""(scale, conditional logits (B, l, V), unconditional ones or None, guidance t) -> (tokens (B, l), codes or None)."""


class VAR(TransformerHubMixin, nn.Module):
    """Decoder-only transformer with adaptive layer norm over the token maps of a tokenizer.

    The tokenizer `vae_local` is kept out of the parameters and of the state dict (`vae_proxy`). `patch_nums` are the
    sides of the scales, L = sum(pn^2) tokens in all, C = `embed_dim`, V = the tokenizer's codes. `flash_if_available`
    and `fused_if_available` False: attention with its norm, or the other operators, stay on their references.
    """

    def __init__(
        self,
        vae_local: VQVAE,
        num_classes: int = 1000,
        depth: int = 16,
        embed_dim: int = 1024,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        shared_aln: bool = False,
        cond_drop_rate: float = 0.1,
        attn_l2_norm: bool = False,
        patch_nums: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        flash_if_available: bool = True,
        fused_if_available: bool = True,
    ):
        super().__init__()
        self.config: dict[str, Any] = dict(
            num_classes=num_classes,
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
            shared_aln=shared_aln,
            cond_drop_rate=cond_drop_rate,
            attn_l2_norm=attn_l2_norm,
            patch_nums=list(patch_nums),
            flash_if_available=flash_if_available,
            fused_if_available=fused_if_available,
        )
        if tuple(patch_nums) != tuple(vae_local.quantize.v_patch_nums):
            raise ValueError(
                f"patch_nums is {tuple(patch_nums)}, expected the tokenizer's, {tuple(vae_local.quantize.v_patch_nums)}"
            )
        self.Cvae, self.V = vae_local.Cvae, vae_local.vocab_size
        self.depth, self.C, self.D, self.num_heads = depth, embed_dim, embed_dim, num_heads
        self.num_classes, self.cond_drop_rate = num_classes, cond_drop_rate
        self.prog_si = -1  # progressive training: the last scale to train, -1: all
        self.recompute_blocks = False  # in training, compute each block's activations again for its backward
        self.patch_nums: tuple[int, ...] = tuple(patch_nums)
        lengths = [pn * pn for pn in self.patch_nums]
        self.L, self.first_l = sum(lengths), lengths[0]
        self.begin_ends = [(sum(lengths[:si]), sum(lengths[: si + 1])) for si in range(len(lengths))]
        self.num_stages_minus_1 = len(lengths) - 1
        # Tuples hide the tokenizer from nn.Module: neither a parameter nor an entry of the state dict.
        self.vae_proxy, self.vae_quant_proxy = (vae_local,), (vae_local.quantize,)
        self._rng: torch.Generator | None = None
        self._native: Any = None
        self.times_trained = 0  # how often training mode was chosen; fused optimizers leave no other trace in weights

        init_std = math.sqrt(1 / self.C / 3)
        self.word_embed = nn.Linear(self.Cvae, self.C)
        self.class_emb = nn.Embedding(num_classes + 1, self.C)  # the last one is the null class, for guidance
        self.pos_start = nn.Parameter(torch.empty(1, self.first_l, self.C))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.L, self.C))
        self.lvl_embed = nn.Embedding(len(self.patch_nums), self.C)
        for weight in (self.class_emb.weight, self.pos_start, self.pos_1LC, self.lvl_embed.weight):
            nn.init.trunc_normal_(weight.data, mean=0, std=init_std)

        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        self.shared_ada_lin = (
            nn.Sequential(nn.SiLU(), SharedAdaLin(self.D, 6 * self.C)) if shared_aln else nn.Identity()
        )
        self.drop_path_rate = drop_path_rate
        drop_paths = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            AdaLNSelfAttn(
                block_idx=i,
                last_drop_p=drop_paths[i - 1] if i else 0.0,
                embed_dim=self.C,
                cond_dim=self.D,
                shared_aln=shared_aln,
                norm_layer=norm_layer,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_paths[i],
                attn_l2_norm=attn_l2_norm,
                flash_if_available=flash_if_available,
                fused_if_available=fused_if_available,
            )
            for i in range(depth)
        )
        scale_of_token_L = torch.cat([torch.full((n,), si) for si, n in enumerate(lengths)])
        self.register_buffer("lvl_1L", scale_of_token_L.view(1, self.L))
        hidden_LL = scale_of_token_L.view(-1, 1) < scale_of_token_L.view(1, -1)
        mask_LL = torch.zeros(self.L, self.L).masked_fill_(hidden_LL, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask_LL.view(1, 1, self.L, self.L).contiguous())
        self.head_nm = AdaLNBeforeHead(self.C, self.D, norm_layer=norm_layer)
        self.fused_backend = self.head_nm.norm_backend = "auto" if fused_if_available else "reference"
        self.head = nn.Linear(self.C, self.V)

    @property
    def rng(self) -> torch.Generator:
        """The generator that `g_seed` seeds, on the model's device."""
        device = self.lvl_1L.device
        if self._rng is None or self._rng.device != device:
            self._rng = torch.Generator(device=device)
        return self._rng

    @rng.setter
    def rng(self, generator: torch.Generator) -> None:
        self._rng = generator

    @rng.deleter
    def rng(self) -> None:
        self._rng = None

    @property
    def uniform_prob(self) -> torch.Tensor:
        """(num_classes,): the chances of the labels where none are given."""
        return torch.full((self.num_classes,), 1 / self.num_classes, device=self.lvl_1L.device)

    def extra_repr(self) -> str:
        return f"drop_path_rate={self.drop_path_rate:g}"

    def __getstate__(self):
        # a generator is neither copied nor pickled with its model, nor is what the native loop holds
        return {**self.__dict__, "_rng": None, "_native": None}

    # ------------------------------------------------------------------------------------------------ training
    def forward(self, label_B: torch.Tensor, x_BLCv_wo_first_l: torch.Tensor) -> torch.Tensor:
        """Teacher forcing: logits (B, L, V) of every token, given the true ones of the earlier scales.

        label_B (B,) int64 in [0, num_classes]; x_BLCv_wo_first_l (B, L - first_l, Cvae) from
        `VectorQuantizer2.idxBl_to_var_input`. With `prog_si` >= 0, L ends with that scale. Each label is replaced by
        the null class with probability `cond_drop_rate`, in evaluation mode too, as in the published code.
        """
        logits_BLV = self.get_logits(*self._features(label_B, x_BLCv_wo_first_l))
        return logits_BLV + self._zero() if self.prog_si == 0 else logits_BLV

    def loss(
        self,
        label_B: torch.Tensor,
        x_BLCv_wo_first_l: torch.Tensor,
        target_BL: torch.Tensor,
        token_weight_BL: torch.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `forward`, and then the cross-entropy with the true tokens (B, L): (loss, loss per scale, accuracy per
        scale), as `var_fast.ops.scale_cross_entropy` defines them.
        """
        h_BLC, cond_BD = self._features(label_B, x_BLCv_wo_first_l)
        h_BLC = self.head_nm(h_BLC.float(), cond_BD.float()).float()
        loss, loss_S, accuracy_S = scale_cross_entropy(
            h_BLC,
            self.head.weight,
            self.head.bias,
            target_BL,
            token_weight_BL,
            label_smoothing,
            self.patch_nums,
            backend=self.fused_backend,
        )
        return (loss + self._zero() if self.prog_si == 0 else loss), loss_S, accuracy_S

    def _features(self, label_B: torch.Tensor, x_BLCv_wo_first_l: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks' output (B, L, C) under teacher forcing, and the condition (B, D)."""
        end = self.begin_ends[self.prog_si][1] if self.prog_si >= 0 else self.L
        device_type = label_B.device.type
        with torch.autocast(device_type, enabled=False):
            drop_B = torch.rand(label_B.shape[0], device=label_B.device) < self.cond_drop_rate
            cond_BD = self.class_emb(torch.where(drop_B, self.num_classes, label_B))
            x_BLC = cond_BD.unsqueeze(1) + self.pos_start
            if self.prog_si != 0:
                x_BLC = torch.cat((x_BLC, self.word_embed(x_BLCv_wo_first_l.float())), dim=1)
            if x_BLC.shape[1] != end:
                raise ValueError(
                    f"x_BLCv_wo_first_l has {x_BLC.shape[1] - self.first_l} tokens, expected {end - self.first_l}"
                )
            x_BLC = x_BLC + self.lvl_embed(self.lvl_1L[:, :end]) + self.pos_1LC[:, :end]
        cond_BD_or_gss = self.shared_ada_lin(cond_BD)
        if torch.is_autocast_enabled(device_type):
            half = torch.get_autocast_dtype(device_type)
            x_BLC, cond_BD_or_gss = x_BLC.to(half), cond_BD_or_gss.to(half)
        attn_bias = self.attn_bias_for_masking[:, :, :end, :end]
        pending = None
        for block in self.blocks:
            if self.recompute_blocks and self.training:
                block = partial(checkpoint, block, use_reentrant=False)
            x_BLC, pending = block(
                x_BLC, cond_BD_or_gss, attn_bias, patch_nums=self.patch_nums, pending=pending, defer=True
            )
        return settle(x_BLC, pending), cond_BD

    def _zero(self) -> torch.Tensor:
        # word_embed has no part in the first scale; DistributedDataParallel wants a gradient, be it zero.
        return 0 * (self.word_embed.weight.sum() + self.word_embed.bias.sum())

    def get_logits(self, h_BLC: torch.Tensor, cond_BD: torch.Tensor) -> torch.Tensor:
        """Logits (B, L, V) in float32 of the blocks' output (B, L, C)."""
        return self.head(self.head_nm(h_BLC.float(), cond_BD.float()).float()).float()

    # ------------------------------------------------------------------------------------------------ sampling
    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | torch.Tensor | None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> torch.Tensor:
        """Sample B images (B, 3, H, W) in [0, 1], with the random draws of the published code.

        label_B: (B,) int64, one int for all, a negative int for the null class, None for random classes. Guidance grows
        from 0 at the first scale to `cfg` at the last: (1 + t) conditional - t unconditional logits. `top_k` 0 and
        `top_p` 0 keep all codes. `more_smooth` mixes codes by a Gumbel softmax (for pictures, not for metrics).
        Raises UserError for bad arguments and where logits are not finite (scale and image are named).
        """
        check_sampling_options(cfg, top_k, top_p)
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        label_B = self.resolve_labels(B, label_B, rng)
        embedding_VC = self.vae_quant_proxy[0].embedding.weight

        def draw(si, logits_BlV):
            check_finite(logits_BlV, si)
            idx_Bl = sample_with_top_k_top_p_(logits_BlV, top_k, top_p, rng)[..., 0]
            if not more_smooth:
                return idx_Bl, None
            sharpness, tau = smoothing(si, len(self.patch_nums))
            return idx_Bl, gumbel_softmax_with_rng(logits_BlV * sharpness, tau, rng=rng) @ embedding_VC

        native = self._native_loop()
        if native is not None:
            return native.sample_drawn_by(label_B, cfg, draw).to(native.dtype)

        def guide_and_draw(si, cond_BlV, uncond_BlV, t):
            return draw(si, cond_BlV if uncond_BlV is None else (1 + t) * cond_BlV - t * uncond_BlV)

        *_, f_hat_BChw = self.sample_scales(label_B, cfg, guide_and_draw)
        return self.vae_proxy[0].fhat_to_img(f_hat_BChw).add_(1).mul_(0.5)

    def _native_loop(self):
        """The C++ loop for this model as it is now, kept for the next call; None where the modules have to do it."""
        # the engine knows the models; they call on it here alone
        from var_fast.engine.loops import choose_loop
        from var_fast.engine.native_loop import NativeLoop

        if self.training or self.vae_proxy[0].training:
            return None
        device_type = self.lvl_1L.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else torch.float32
        loop = choose_loop(self, dtype, last=self._native)
        self._native = loop if isinstance(loop, NativeLoop) else None
        return self._native

    def train(self, mode: bool = True) -> VAR:
        """As nn.Module's. Training lets go of what sampling has packed: weights will change, and memory is wanted."""
        if mode:
            self._native = None
            self.times_trained += 1
        return super().train(mode)

    def resolve_labels(self, B: int, label_B: int | torch.Tensor | None, rng: torch.Generator | None) -> torch.Tensor:
        """(B,) int64 on the model's device, from any form that `autoregressive_infer_cfg` takes, or a UserError."""
        device = self.lvl_1L.device
        if label_B is None:
            return torch.multinomial(self.uniform_prob, num_samples=B, replacement=True, generator=rng).view(B)
        if isinstance(label_B, int):
            label_B = torch.full((B,), self.num_classes if label_B < 0 else label_B, device=device)
        label_B = label_B.to(device)
        if label_B.shape != (B,):
            raise UserError(f"label_B has shape {tuple(label_B.shape)}, expected (B,) = ({B},)")
        bad_B = (label_B < 0) | (label_B > self.num_classes)
        if bad_B.any():
            raise UserError(
                f"label_B holds {label_B[bad_B][0].item()}, expected 0 to {self.num_classes - 1}, "
                f"or {self.num_classes} for the null class"
            )
        return label_B

    @torch.no_grad()
    def sample_scales(self, label_B: torch.Tensor, cfg: float, draw: Draw) -> Iterator[torch.Tensor]:
        """The sampling loop (VAR figure 4): yields f_hat (B, Cvae, h, w), the same tensor, after each scale.

        `draw` picks the tokens of a scale. What does not depend on the scale, the blocks' modulation, is computed once.
        Without guidance the unconditional half is not computed at all; at the first scale, where guidance is 0, only
        its keys and values are.
        """
        quantize, B = self.vae_quant_proxy[0], label_B.shape[0]
        guided = cfg != 0 and self.num_stages_minus_1 > 0
        rows = torch.cat((label_B, torch.full_like(label_B, self.num_classes))) if guided else label_B
        cond_RD = self.class_emb(rows)
        cond_RD_or_gss = self.shared_ada_lin(cond_RD)
        modulations = [block.modulation(cond_RD_or_gss) for block in self.blocks]
        pos_1LC = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        x_RlC = cond_RD.unsqueeze(1) + self.pos_start + pos_1LC[:, : self.first_l]
        f_hat_BChw = torch.zeros(B, self.Cvae, *(self.patch_nums[-1],) * 2, device=label_B.device)
        caches = [KVCache(self.L) for _ in self.blocks]
        for si, pn in enumerate(self.patch_nums):
            pending = None
            for block, modulation, cache in zip(self.blocks, modulations, caches, strict=True):
                x_RlC, pending = block.forward_modulated(x_RlC, modulation, cache=cache, pending=pending)
            x_RlC = settle(x_RlC, pending)
            t = cfg * si / max(self.num_stages_minus_1, 1)
            if guided and t != 0:
                cond_BlV, uncond_BlV = self.get_logits(x_RlC, cond_RD).chunk(2)
            else:
                cond_BlV, uncond_BlV = self.get_logits(x_RlC[:B], cond_RD[:B]), None
            idx_Bl, h_BlC = draw(si, cond_BlV, uncond_BlV, t)
            if h_BlC is None:
                next_BCpp = quantize.add_tokens(si, idx_Bl, f_hat_BChw)
            else:
                h_BCpp = h_BlC.float().transpose(1, 2).reshape(B, self.Cvae, pn, pn)
                _, next_BCpp = quantize.get_next_autoregressive_input(si, len(self.patch_nums), f_hat_BChw, h_BCpp)
            if si < self.num_stages_minus_1:
                begin, end = self.begin_ends[si + 1]
                x_BlC = self.word_embed(next_BCpp.flatten(2).transpose(1, 2)) + pos_1LC[:, begin:end]
                x_RlC = x_BlC.repeat(2, 1, 1) if guided else x_BlC
            yield f_hat_BChw

    # ------------------------------------------------------------------------------------------ initialisation
    def init_weights(
        self,
        init_adaln: float = 0.5,
        init_adaln_gamma: float = 1e-5,
        init_head: float = 0.02,
        init_std: float = 0.02,
        conv_std_or_gain: float = 0.02,
    ) -> None:
        """The published initialisation: truncated normals of `init_std` (< 0: sqrt(1 / (3 C))), zero biases, the head
        times `init_head` (< 0: left alone), branches ending in 1 / sqrt(2 depth), modulation times `init_adaln`, gates
        times `init_adaln_gamma`. `conv_std_or_gain` has no layer to act on here; it is part of the published signature.
        """
        std = math.sqrt(1 / self.C / 3) if init_std < 0 else init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight.data, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.zero_()
        if init_head >= 0:
            self.head.weight.data.mul_(init_head)
        self.head_nm.ada_lin[-1].weight.data.mul_(init_adaln)
        for block in self.blocks:
            block.attn.proj.weight.data.div_(math.sqrt(2 * self.depth))
            block.ffn.fc2.weight.data.div_(math.sqrt(2 * self.depth))
            # rows 0 and 1 of the six are the gates
            six = block.ada_gss.data[0, 0] if block.shared_aln else block.ada_lin[-1].weight.data.view(6, self.C, -1)
            six[2:].mul_(init_adaln)
            six[:2].mul_(init_adaln_gamma)


def check_sampling_options(cfg: float, top_k: int, top_p: float) -> None:
    """Raises UserError for options out of range."""
    if not math.isfinite(cfg):
        raise UserError(f"cfg is {cfg}, expected a finite number")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}, expected at least 0 (0: all codes)")
    if top_k != int(top_k):
        raise UserError(f"top_k is {top_k}, expected a whole number")
    if not 0 <= top_p <= 1:
        raise UserError(f"top_p is {top_p}, expected 0 to 1 (0: all codes)")


def check_finite(logits_BlV: torch.Tensor, si: int) -> None:
    """Raises UserError naming the scale and the image whose logits hold NaN or infinity."""
    finite_B = torch.isfinite(logits_BlV).flatten(1).all(1)
    if not finite_B.all():
        raise NotFiniteLogits(si, int((~finite_B).nonzero()[0]))


class NotFiniteLogits(UserError):
    """Logits that hold NaN or infinity, at `scale` of the `image` of this index."""

    def __init__(self, scale: int, image: int):
        super().__init__(f"logits are not finite at scale {scale}, image {image}: check the weights, the dtype and cfg")
        self.scale, self.image = scale, image
