"""DropPath: leaves a residual branch out for some of the images (stochastic depth, Huang et al. 2016)."""

from __future__ import annotations

import torch
from torch import nn


class DropPath(nn.Module):
    """In training, zeroes a branch's gate (B, C) for each image with probability `drop_prob`, and scales the kept
    ones up.

    Dropping the gate is dropping the branch: no second pass over the tokens.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, gate_BC: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0 or not self.training:
            return gate_BC
        keep = 1 - self.drop_prob
        return gate_BC * gate_BC.new_empty(gate_BC.shape[0], 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"
