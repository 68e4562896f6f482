"""A discriminator in training, with its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from var_fast.training.adam_state import adam_tensors
from var_fast.training.adversary.dino import DinoHeads
from var_fast.training.adversary.losses import LeCam, hinge_discriminator, hinge_generator, r1_penalty
from var_fast.training.adversary.patchgan import PatchGan
from var_fast.training.adversary.vit import load_vit
from var_fast.training.optimizer import clip_and_step, set_rates, weight_groups
from var_fast.training.parallel import parallelise
from var_fast.training.ranks import Ranks

DISCRIMINATORS = ("none", "patchgan", "dino")
LOGGED = ("disc_loss", "disc_real", "disc_fake", "disc_grad_norm")
"""What a step of an Adversary returns: its loss, regularisers included, mean logits, norm of its gradient."""


class Adversary:
    """Tells real pictures from reconstructions, both (B, 3, H, W) in [-1, 1], and learns to.

    features: frozen, what the pictures are judged by; network: judges, as logits (B, patches), and is trained.
    """

    def __init__(
        self,
        features: nn.Module,
        network: nn.Module,
        ranks: Ranks,
        *,
        lr: float,
        clip: float,
        r1: float = 0.0,
        r1_every: int = 16,
        lecam: float = 0.0,
    ) -> None:
        """clip: most norm of a gradient. r1: weight of the gradient penalty, taken every `r1_every` steps, then times
        as much. lecam: weight of the LeCam regulariser.
        """
        self.features = features.to(ranks.device)
        self.network = network.to(ranks.device).train()
        self.ranks, self.clip = ranks, clip
        self.r1, self.r1_every, self.lecam_weight = r1, r1_every, lecam
        self.lecam = LeCam(ranks.device)
        # The betas of Esser et al. 2021; a discriminator whose gradient turns must forget soon.
        self.optimizer = torch.optim.AdamW(weight_groups(network, 0.0), lr=lr, betas=(0.5, 0.9), fused=True)
        self._judge = parallelise(self.network, ranks)

    def generator_loss(self, fake_B3HW: torch.Tensor) -> torch.Tensor:
        """What a reconstruction is told, (); its gradient reaches the pictures alone."""
        self.network.requires_grad_(False)
        loss = hinge_generator(self.network(self.features(fake_B3HW)))
        self.network.requires_grad_(True)
        return loss

    def step(self, real_B3HW: torch.Tensor, fake_B3HW: torch.Tensor, step: int, lr: float) -> dict[str, torch.Tensor]:
        """One step of learning at step number `step` of the run; means over this rank, (LOGGED)."""
        penalise = self.r1 > 0 and step % self.r1_every == 0
        real_B3HW = real_B3HW.detach().requires_grad_(penalise)
        # One pass over both: the wrapper that averages gradients over ranks wants one backward pass per forward pass.
        logits = self._judge(self.features(torch.cat([real_B3HW, fake_B3HW.detach()])))
        real_BN, fake_BN = logits.chunk(2)
        loss = hinge_discriminator(real_BN, fake_BN)
        if self.lecam_weight > 0:
            loss = loss + self.lecam_weight * self.lecam(real_BN, fake_BN, self.ranks)
        if penalise:
            loss = loss + self.r1 * self.r1_every * r1_penalty(real_BN, real_B3HW)
        loss.backward()
        set_rates(self.optimizer, lr)
        norm = clip_and_step(self.optimizer, self.network.parameters(), self.clip)
        found = (loss, real_BN.mean(), fake_BN.mean(), norm)
        return {name: value.detach() for name, value in zip(LOGGED, found, strict=True)}

    def tensors(self) -> dict[str, Any]:
        """All it takes to go on: the very tensors in use."""
        return {
            "network": self.network.state_dict(),
            "optimizer": adam_tensors(self.network, self.optimizer),
            "lecam": self.lecam.sums,
        }


def build_adversary(kind: str, ranks: Ranks, *, size: int, dino_weights: str = "", **options: Any) -> Adversary | None:
    """The discriminator of that kind (DISCRIMINATORS) for pictures of `size` pixels; None for "none".

    options: those of Adversary. Raises UserError for pictures too small, or where the weights of DINO's vision
    transformer are missing.
    """
    if kind == "none":
        return None
    if kind == "patchgan":
        return Adversary(nn.Identity(), PatchGan(size), ranks, **options)
    features = load_vit(dino_weights)
    return Adversary(features, DinoHeads(features.widths), ranks, **options)
