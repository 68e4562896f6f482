"""Losses of the discriminator, all on logits (B, patches), and of what it judges."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.training.ranks import Ranks


def hinge_discriminator(real_BN: torch.Tensor, fake_BN: torch.Tensor) -> torch.Tensor:
    """Half of E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))] (Lim and Ye 2017; Esser et al. 2021 halve it)."""
    return 0.5 * (F.relu(1.0 - real_BN).mean() + F.relu(1.0 + fake_BN).mean())


def hinge_generator(fake_BN: torch.Tensor) -> torch.Tensor:
    """-E[D(fake)]."""
    return -fake_BN.mean()


def r1_penalty(real_BN: torch.Tensor, img_B3HW: torch.Tensor) -> torch.Tensor:
    """E[|d D / d picture|^2] / 2 at the real pictures, which must require a gradient; D is the mean of a picture's
    logits (Mescheder et al. 2018, Which training methods for GANs do actually converge, eq. 9)."""
    (grad_B3HW,) = torch.autograd.grad(real_BN.mean(1).sum(), img_B3HW, create_graph=True)
    return 0.5 * grad_B3HW.square().flatten(1).sum(1).mean()


class LeCam:
    """The regulariser of Tseng et al. 2021 (Regularizing generative adversarial networks under limited data):
    E[(D(real) - a_fake)^2] + E[(D(fake) - a_real)^2], with anchors a that follow the mean logits of all ranks."""

    def __init__(self, device: torch.device, decay: float = 0.99) -> None:
        self.decay = decay
        # Running sums of the real and the fake logits' means, and of their weights, which tell the zero start apart.
        self.sums = torch.zeros(3, device=device)

    def __call__(self, real_BN: torch.Tensor, fake_BN: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        """The penalty, after the anchors took in this step's logits."""
        means = ranks.mean_(torch.stack([real_BN.detach().mean(), fake_BN.detach().mean()]))
        self.sums.lerp_(torch.cat([means, means.new_ones(1)]), 1.0 - self.decay)
        anchor_real, anchor_fake = (self.sums[:2] / self.sums[2]).unbind()
        return (real_BN - anchor_fake).square().mean() + (fake_BN - anchor_real).square().mean()
