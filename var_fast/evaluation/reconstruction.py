"""How well a tokenizer gives pictures back, and which of its codes it uses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from var_fast.errors import UserError
from var_fast.evaluation.psnr import psnr_B
from var_fast.evaluation.ssim import ssim_B
from var_fast.models import VQVAE
from var_fast.training.ranks import Ranks


@torch.no_grad()
def reconstruction_metrics(
    vae: VQVAE, batches: Iterable[torch.Tensor], ranks: Ranks | None = None
) -> dict[str, int | float | list[float]]:
    """Metrics of pictures sent through the tokenizer and back, over the pictures of all ranks.

    `batches`: this rank's pictures, (B, 3, H, W) in [-1, 1]; there may be none on some ranks. Returns

    - images: how many pictures there were;
    - psnr_db, ssim: means of the pictures' own PSNR (dB; 100 for a picture without error) and SSIM;
    - code_use_percent: codes met at any scale, in percent of the codebook; code_use_percent_per_scale: at each scale;
    - perplexity_per_scale: exp of the entropy of the code frequencies: as many codes, all used alike, would be as hard
      to guess.

    Ranks add up whole counts and float64 sums, so their number changes nothing but the last bits. The tokenizer's mode
    stays as it was. Raises UserError if there are no pictures, or if a reconstruction is not finite.
    """
    ranks = ranks or Ranks()
    device = next(vae.parameters()).device
    count_KV = torch.zeros(len(vae.quantize.v_patch_nums), vae.vocab_size, dtype=torch.int64, device=device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # pictures, PSNR, SSIM
    was_training = vae.training
    vae.eval()
    try:
        # as `var-fast tokenize` computes, and a CPU
        with ranks.together(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for image_B3HW in batches:
                sums += _add_batch(vae, image_B3HW.to(device), count_KV)
            if not bool(sums.isfinite().all()):
                raise UserError("the tokenizer's reconstructions are not finite numbers: check its weights")
    finally:
        vae.train(was_training)
    images, psnr, ssim = ranks.sum_(sums).tolist()
    if not images:
        raise UserError("there are no pictures to reconstruct, expected at least one")
    return {"images": int(images), "psnr_db": psnr / images, "ssim": ssim / images, **code_use(ranks.sum_(count_KV))}


def _add_batch(vae: VQVAE, image_B3HW: torch.Tensor, count_KV: torch.Tensor) -> torch.Tensor:
    """(3,) number of pictures, sum of PSNR, sum of SSIM; codes are counted in `count_KV`."""
    idx_Bl = vae.img_to_idxBl(image_B3HW)
    for count_V, idx in zip(count_KV, idx_Bl, strict=True):
        count_V += torch.bincount(idx.flatten(), minlength=len(count_V))
    again_B3HW = vae.idxBl_to_img(idx_Bl, same_shape=True, last_one=True)
    a_B3HW, b_B3HW = image_B3HW.double().add(1).div(2), again_B3HW.double().add(1).div(2)
    psnr_and_ssim = torch.stack([psnr_B(a_B3HW, b_B3HW).sum(), ssim_B(a_B3HW, b_B3HW).sum()])
    return torch.cat([psnr_and_ssim.new_tensor([len(a_B3HW)]), psnr_and_ssim])


def code_use(count_KV: torch.Tensor) -> dict[str, Any]:
    """Code use in percent of the codebook, of all scales and per scale, and perplexity per scale, from how often each
    of V codes was met at each of K scales: (K, V) int64."""
    p_KV = count_KV.double() / count_KV.sum(1, keepdim=True).clamp(min=1)
    entropy_K = -torch.special.xlogy(p_KV, p_KV).sum(1)
    return {
        "code_use_percent": 100.0 * float((count_KV.sum(0) > 0).double().mean()),
        "code_use_percent_per_scale": ((count_KV > 0).double().mean(1) * 100.0).tolist(),
        "perplexity_per_scale": entropy_K.exp().tolist(),
    }
