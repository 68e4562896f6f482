"""Sampler: images from labels and seeds, an image independent of the batch it is made in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch

from var_fast.engine.philox import uniforms
from var_fast.errors import UserError
from var_fast.models import VAR
from var_fast.models.published_draws import smoothing
from var_fast.models.var import check_finite, check_sampling_options
from var_fast.ops import filter_logits_, sample_tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKEN_STREAM, GUMBEL_STREAM = 0, 1


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 matrix products in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for this; where the private one is gone, float32 is the safe answer
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def _whole_numbers(name: str, values: Sequence[int] | torch.Tensor) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(values)
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"they are {tensor.dtype}")
        return tensor.to(torch.int64).flatten()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{name} is {str(values)[:60]}, expected whole numbers of 64 bits: {error}") from error


class Sampler:
    """Samples a VAR with one random stream per image, keyed by (seed of the image, scale, token).

    `dtype`: "float32" (the reference's tokens; on CUDA, convolutions round to TF32 unless
    torch.backends.cudnn.allow_tf32 is False), "bfloat16" or "float16" (autocast), or "auto": bfloat16 where the
    device computes in it, else float32. `device`: moves the model there; None: where it is. `max_batch`: larger
    requests are made in parts. Raises UserError for an unknown dtype or device.
    """

    def __init__(self, var: VAR, *, dtype: str = "auto", device: str | torch.device | None = None, max_batch: int = 64):
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}, expected at least 1")
        self.vae = var.vae_proxy[0]
        if device is not None:
            try:
                var.to(device)
                self.vae.to(device)
            except (RuntimeError, AssertionError) as error:
                raise UserError(f"device is {str(device)!r}, which cannot be used here: {error}") from error
        self.var, self.max_batch, self.device = var.eval(), max_batch, var.lvl_1L.device
        self.vae.eval()
        if dtype == "auto":
            dtype = "bfloat16" if computes_in_bfloat16(self.device) else "float32"
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]

    def sample(
        self,
        labels: Sequence[int] | torch.Tensor,
        seeds: Sequence[int] | torch.Tensor,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        more_smooth: bool = False,
    ) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [0, 1], one for each of the B labels and seeds.

        Labels are 0 to num_classes - 1, or num_classes for the null class; `cfg` guidance at the last scale, growing
        from 0; `top_k` 0 and `top_p` 0 keep all codes; `more_smooth` mixes codes by a Gumbel softmax (for pictures,
        not for metrics). Raises UserError for arguments out of range and for logits that are not finite.
        """
        parts = []
        for part in self._parts(labels, seeds, cfg, top_k, top_p):
            with self._autocast():
                *_, f_hat_BChw = self._scales(*part, cfg, top_k, top_p, more_smooth)
            parts.append(self._decode(f_hat_BChw))
        return torch.cat(parts)

    def stream(
        self,
        labels: Sequence[int] | torch.Tensor,
        seeds: Sequence[int] | torch.Tensor,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        more_smooth: bool = False,
    ) -> Iterator[torch.Tensor]:
        """As `sample`, but yields the images after each scale; the last are the finished ones."""
        parts = [
            self._scales(*part, cfg, top_k, top_p, more_smooth)
            for part in self._parts(labels, seeds, cfg, top_k, top_p)
        ]
        # One part at a time would hold back the first images, so all parts advance together.
        for _ in self.var.patch_nums:
            with self._autocast():
                f_hats = [next(part) for part in parts]
            yield torch.cat([self._decode(f_hat) for f_hat in f_hats])

    def _parts(self, labels, seeds, cfg, top_k, top_p) -> list[tuple[torch.Tensor, torch.Tensor]]:
        check_sampling_options(cfg, top_k, top_p)
        label_B, seed_B = _whole_numbers("labels", labels), _whole_numbers("seeds", seeds)
        if len(label_B) != len(seed_B) or len(label_B) == 0:
            raise UserError(f"{len(label_B)} labels and {len(seed_B)} seeds, expected as many of each and at least one")
        label_B = self.var.resolve_labels(len(label_B), label_B, None)
        return list(zip(label_B.split(self.max_batch), seed_B.to(self.device).split(self.max_batch), strict=True))

    def _autocast(self):
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _scales(self, label_B, seed_B, cfg, top_k, top_p, more_smooth) -> Iterator[torch.Tensor]:
        embedding_VC = self.var.vae_quant_proxy[0].embedding.weight

        def draw(si, cond_BlV, uncond_BlV, t):
            check_finite(cond_BlV if uncond_BlV is None else cond_BlV + uncond_BlV, si)
            u_Bl = uniforms(seed_B, TOKEN_STREAM, si, cond_BlV.shape[1]).squeeze(-1)
            idx_Bl = sample_tokens(cond_BlV, uncond_BlV, t, top_k, top_p, u_Bl)
            if not more_smooth:
                return idx_Bl, None
            sharpness, tau = smoothing(si, len(self.var.patch_nums))
            logits_BlV = cond_BlV if uncond_BlV is None else (1 + t) * cond_BlV - t * uncond_BlV
            logits_BlV = filter_logits_(logits_BlV.clone(), top_k, top_p) * sharpness
            u_BlV = uniforms(seed_B, GUMBEL_STREAM, si, *logits_BlV.shape[1:])
            gumbel_BlV = -torch.log(-torch.log(u_BlV.clamp_min(2**-25)))
            weights_BlV = ((logits_BlV + gumbel_BlV) / tau).softmax(dim=-1)
            return idx_Bl, weights_BlV @ embedding_VC

        return self.var.sample_scales(label_B, cfg, draw)

    @torch.no_grad()
    def _decode(self, f_hat_BChw: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            return self.vae.fhat_to_img(f_hat_BChw).float().add_(1).mul_(0.5)
