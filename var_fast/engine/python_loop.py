"""PythonLoop: the sampling loop through the PyTorch modules, on any device and in any dtype; the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from var_fast.engine.mixed_codes import mixed_codes
from var_fast.engine.options import SamplingOptions, final_image
from var_fast.models import VAR
from var_fast.models.var import check_finite
from var_fast.ops import sample_tokens

Keep = Callable[[int, torch.Tensor, "torch.Tensor | None"], "tuple[torch.Tensor, torch.Tensor | None]"]
"""(scale, drawn tokens (B, l), mixed codes (B, l, Cvae) or None) -> those to go on with."""


class PythonLoop:
    """As NativeLoop."""

    def __init__(self, var: VAR, dtype: torch.dtype):
        self.var, self.vae, self.dtype = var, var.vae_proxy[0], dtype

    def sample(self, label_B: torch.Tensor, seed_B: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1]."""
        return final_image(self.steps(label_B, seed_B, options), len(self.var.patch_nums))

    def steps(
        self,
        label_B: torch.Tensor,
        seed_B: torch.Tensor,
        options: SamplingOptions,
        keep: Keep | None = None,
    ) -> Iterator[Callable[[], torch.Tensor]]:
        """After each scale a function that decodes the images as they stand, good until the next step."""
        var = self.var
        cfg, top_k, top_p, more_smooth = options
        codebook_VC = var.vae_quant_proxy[0].embedding.weight

        def draw(si, cond_BlV, uncond_BlV, t):
            check_finite(cond_BlV if uncond_BlV is None else cond_BlV + uncond_BlV, si)
            idx_Bl, codes_BlC = sample_tokens(cond_BlV, uncond_BlV, t, top_k, top_p, seed_B, si), None
            if more_smooth:
                logits_BlV = cond_BlV if uncond_BlV is None else (1 + t) * cond_BlV - t * uncond_BlV
                codes_BlC = mixed_codes(logits_BlV, seed_B, si, len(var.patch_nums), top_k, top_p, codebook_VC)
            return keep(si, idx_Bl, codes_BlC) if keep else (idx_Bl, codes_BlC)

        scales = var.sample_scales(label_B, cfg, draw)
        for _ in var.patch_nums:
            with self._autocast():
                f_hat_BChw = next(scales)
            yield lambda: self._decode(f_hat_BChw)  # noqa: B023 - the tensor is one and the same at every scale

    @torch.no_grad()
    def _decode(self, f_hat_BChw: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            return self.vae.fhat_to_img(f_hat_BChw).float().add_(1).mul_(0.5)

    def _autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.var.lvl_1L.device.type, dtype=self.dtype)
