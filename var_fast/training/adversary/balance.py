"""How much the discriminator's word counts beside the reconstruction's."""

from __future__ import annotations

import torch

from var_fast.training.ranks import Ranks


def last_layer_gradients(
    recon_B3HW: torch.Tensor, last_layer: torch.Tensor, grads_B3HW: list[torch.Tensor], ranks: Ranks
) -> list[torch.Tensor]:
    """The gradients that each of `grads_B3HW`, with respect to the reconstruction, brings to the decoder's last layer,
    averaged over the ranks: those of the whole batch."""
    return [ranks.mean_(torch.autograd.grad(recon_B3HW, last_layer, grad, retain_graph=True)[0]) for grad in grads_B3HW]


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, most: float) -> torch.Tensor:
    """|gradient of the reconstruction loss| / |gradient of the adversarial loss|, at most `most`: with it both pull at
    the last layer alike (Esser et al. 2021, Taming transformers, eq. 7).

    Rounded to bfloat16 (0.4%): the last bits of the norms depend on how the batch is dealt out to ranks, and would give
    every number of the backward pass other last bits, where else only sums over the batch have them.
    """
    weight = (reconstruction.norm() / (adversarial.norm() + 1e-6)).clamp(max=most)
    return weight.bfloat16().to(weight.dtype)
