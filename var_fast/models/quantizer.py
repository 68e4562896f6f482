"""VectorQuantizer2: the multi-scale residual quantizer (VAR section 3.1, algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from var_fast.models.gradient_estimators import straight_through
from var_fast.models.phi import Phi, build_phi
from var_fast.ops import multiscale_quantize, pyramid_update
from var_fast.ops.multiscale_quantize import bicubic_up, scale_position


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class VectorQuantizer2(nn.Module):
    """Codes a feature map (B, Cvae, h, w) as token maps of growing sides `v_patch_nums`; one codebook for all scales.

    `prog_si` >= 0 limits the work to scales up to that one (progressive training). `pass_gradient(f, f_hat)` returns
    f_hat, and passes its gradient on to f (`var_fast.models.gradient_estimators`). `hit_SV`: how often each code was
    chosen at each scale in the last training step, by all ranks together; None before the first.
    """

    def __init__(
        self,
        vocab_size: int,
        Cvae: int,
        using_znorm: bool,
        beta: float = 0.25,
        default_qresi_counts: int = 0,
        v_patch_nums: Sequence[int] | None = None,
        quant_resi: float = 0.5,
        share_quant_resi: int = 4,
    ):
        super().__init__()
        if not v_patch_nums or list(v_patch_nums) != sorted(set(v_patch_nums)) or v_patch_nums[0] < 1:
            raise ValueError(f"v_patch_nums is {v_patch_nums}, expected growing sides of at least 1")
        self.vocab_size, self.Cvae, self.using_znorm, self.beta = vocab_size, Cvae, using_znorm, beta
        self.v_patch_nums: tuple[int, ...] = tuple(v_patch_nums)
        self.quant_resi_ratio = quant_resi
        self.quant_resi = build_phi(Cvae, quant_resi, share_quant_resi, default_qresi_counts or len(self.v_patch_nums))
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(self.v_patch_nums), vocab_size))
        self.record_hit = 0
        self.embedding = nn.Embedding(vocab_size, Cvae)
        self.prog_si = -1
        self.pass_gradient = straight_through
        self.hit_SV: torch.Tensor | None = None

    def eini(self, eini: float) -> None:
        """Initialise the codebook: eini > 0 truncated normal of that deviation, < 0 uniform in +-|eini| /
        vocab_size.
        """
        if eini > 0:
            nn.init.trunc_normal_(self.embedding.weight.data, std=eini)
        elif eini < 0:
            nn.init.uniform_(self.embedding.weight.data, -abs(eini) / self.vocab_size, abs(eini) / self.vocab_size)

    def extra_repr(self) -> str:
        return (
            f"{self.v_patch_nums}, znorm={self.using_znorm}, beta={self.beta}, S={len(self.v_patch_nums)}, "
            f"quant_resi={self.quant_resi_ratio}"
        )

    def _phi(self, si: int) -> nn.Module:
        return self.quant_resi[scale_position(si, len(self.v_patch_nums))]

    def forward(
        self, f_BChw: torch.Tensor, ret_usages: bool = False
    ) -> tuple[torch.Tensor, list[float] | None, torch.Tensor]:
        """Training step of the quantizer: (f_hat, which passes its gradient on to f, code use per scale in %, VQ loss).

        The loss is the mean over scales of |f_hat_k - sg(f)|^2 + beta |sg(f_hat_k) - f|^2, f_hat_k the sum up to
        scale k. In training mode the code counts (summed over ranks) enter `ema_vocab_hit_SV`; `record_hit` counts
        the steps. (The published code counts every scale as a step and starts all scales but the first from 0.)
        """
        f_BChw = f_BChw.float()
        f_no_grad_BChw = f_BChw.detach()
        losses = []

        def add_loss(f_hat_BChw):
            commitment = F.mse_loss(f_hat_BChw.detach(), f_BChw)
            losses.append(self.beta * commitment + F.mse_loss(f_hat_BChw, f_no_grad_BChw))

        with torch.autocast(f_BChw.device.type, enabled=False):
            idx_Bl_per_scale, f_hat_BChw = multiscale_quantize(
                f_no_grad_BChw,
                self.embedding.weight,
                self.quant_resi.__getitem__,
                self.v_patch_nums,
                self.using_znorm,
                on_scale=add_loss,
            )
            vq_loss = torch.stack(losses).mean()
            f_hat_BChw = self.pass_gradient(f_BChw, f_hat_BChw)
        if self.training:
            self._record_code_use(idx_Bl_per_scale)
        return f_hat_BChw, self._code_use_percent(f_BChw) if ret_usages else None, vq_loss

    @torch.no_grad()
    def _record_code_use(self, idx_Bl_per_scale: list[torch.Tensor]) -> None:
        hit_SV = torch.zeros_like(self.ema_vocab_hit_SV)
        for hit_V, idx_Bl in zip(hit_SV, idx_Bl_per_scale):
            # Not bincount, for which the CPU would wait for the GPU.
            hit_V.scatter_add_(0, idx_Bl.reshape(-1), hit_V.new_ones(()).expand(idx_Bl.numel()))
        if _world_size() > 1:
            dist.all_reduce(hit_SV)
        self.hit_SV = hit_SV
        keep = 0.0 if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
        self.ema_vocab_hit_SV.mul_(keep).add_(hit_SV, alpha=1 - keep)
        self.record_hit += 1

    def _code_use_percent(self, f_BChw: torch.Tensor) -> list[float]:
        # A code counts as used where it was hit 8% as often as under an even use at the largest scale.
        vectors = f_BChw.numel() / f_BChw.shape[1]
        margin = _world_size() * vectors / self.vocab_size * 0.08
        return (self.ema_vocab_hit_SV >= margin).float().mean(dim=1).mul(100).tolist()

    def f_to_idxBl_or_fhat(
        self,
        f_BChw: torch.Tensor,
        to_fhat: bool,
        v_patch_nums: Sequence[int] | Sequence[tuple[int, int]] | None = None,
    ) -> list[torch.Tensor]:
        """Tokens (B, l) of every scale, or with `to_fhat` the running sums f_hat (B, Cvae, h, w) after each scale."""
        patch_nums = tuple(v_patch_nums or self.v_patch_nums)
        f_hats: list[torch.Tensor] = []
        idx_Bl_per_scale, _ = multiscale_quantize(
            f_BChw.detach(),
            self.embedding.weight,
            self.quant_resi.__getitem__,
            patch_nums,
            self.using_znorm,
            on_scale=f_hats.append if to_fhat else None,
        )
        scales = f_hats if to_fhat else idx_Bl_per_scale
        return scales[: self.prog_si + 1] if self.prog_si >= 0 else scales

    def embed_to_fhat(
        self, ms_h_BChw: list[torch.Tensor], all_to_max_scale: bool = True, last_one: bool = False
    ) -> list[torch.Tensor] | torch.Tensor:
        """Running sums of the scales' maps (B, Cvae, pn, pn), at the largest side, or each at its own scale's side."""
        f_hat_BChw, f_hats = None, []
        for si, pn in enumerate(self.v_patch_nums):
            side = self.v_patch_nums[-1] if all_to_max_scale else pn
            h_BChw = self._phi(si)(bicubic_up(ms_h_BChw[si], (side, side)))
            f_hat_BChw = h_BChw if f_hat_BChw is None else bicubic_up(f_hat_BChw, (side, side)) + h_BChw
            f_hats.append(f_hat_BChw)
        return f_hat_BChw if last_one else f_hats

    def idxBl_to_var_input(self, gt_ms_idx_Bl: list[torch.Tensor]) -> torch.Tensor | None:
        """Teacher forcing: what the transformer is given for scales 1.. when these are the true tokens (VAR algorithm
        2).

        Takes the tokens (B, l) of every scale, returns (B, L - first_l, Cvae) float32; None where `prog_si` leaves no
        scale.
        """
        B, side = gt_ms_idx_Bl[0].shape[0], self.v_patch_nums[-1]
        f_hat_BChw = self.embedding.weight.new_zeros(B, self.Cvae, side, side, dtype=torch.float32)
        maps_BlC = []
        for si in range(len(self.v_patch_nums) - 1):
            if 0 <= self.prog_si <= si:
                break
            next_BCpp = self.add_tokens(si, gt_ms_idx_Bl[si], f_hat_BChw)
            maps_BlC.append(next_BCpp.flatten(2).transpose(1, 2))
        return torch.cat(maps_BlC, dim=1) if maps_BlC else None

    def tokens_to_map(self, idx_Bl: torch.Tensor, pn: int) -> torch.Tensor:
        """The codes (B, Cvae, pn, pn) of tokens (B, pn * pn)."""
        return self.embedding(idx_Bl).transpose(1, 2).reshape(idx_Bl.shape[0], self.Cvae, pn, pn)

    def add_tokens(self, si: int, idx_Bl: torch.Tensor, f_hat_BChw: torch.Tensor) -> torch.Tensor:
        """Adds scale `si`'s tokens (B, l) to f_hat (B, Cvae, h, w) in place and returns the next scale's map (the last
        scale's: f_hat's own size)."""
        phi, pn = self._phi(si), self.v_patch_nums[si]
        conv = (phi.weight, phi.bias, phi.resi_ratio) if isinstance(phi, Phi) else (None, None, 0.0)
        pn_next = self.v_patch_nums[min(si + 1, len(self.v_patch_nums) - 1)]
        return pyramid_update(idx_Bl, self.embedding.weight, *conv, f_hat_BChw, pn, pn_next)

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: torch.Tensor, h_BChw: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds scale `si`'s map (B, Cvae, pn, pn) to f_hat in place; (f_hat, next scale's map), f_hat itself at the
        end.
        """
        side = self.v_patch_nums[-1]
        f_hat.add_(self.quant_resi[scale_position(si, SN)](bicubic_up(h_BChw, (side, side))))
        if si == SN - 1:
            return f_hat, f_hat
        return f_hat, F.interpolate(f_hat, size=(self.v_patch_nums[si + 1],) * 2, mode="area")
