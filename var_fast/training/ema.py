"""Exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn


class Ema:
    """Keeps `average`, a model of the same shape (and sharded alike), close behind `model`; evaluation and what is
    saved for use take the average.
    """

    def __init__(self, model: nn.Module, average: nn.Module, decay: float) -> None:
        self.average = average.eval().requires_grad_(False)
        self.decay = decay
        self._pairs = [(_local(a), _local(p)) for a, p in zip(average.parameters(), model.parameters(), strict=True)]
        self._buffers = list(zip(average.buffers(), model.buffers(), strict=True))
        for a, p in self._pairs + self._buffers:
            a.copy_(p)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the model; the decay starts low, so that the random start is forgotten soon."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([a for a, _ in self._pairs], [p for _, p in self._pairs], 1.0 - decay)
        for a, b in self._buffers:
            a.copy_(b)


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's shard; an average of shards is a shard of the average."""
    tensor = parameter.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
