"""Which codes the steps of a run use, at each scale, watched over windows of steps."""

from __future__ import annotations

from typing import Any

import torch


class CodeUse:
    """Counts of the window of steps under way, and of the last one that was closed; on the device, of all ranks."""

    def __init__(self, scales: int, vocab_size: int, device: torch.device) -> None:
        self.steps = 0  # of the window under way
        self.hit_SV = torch.zeros(scales, vocab_size, dtype=torch.int64, device=device)
        self.steps_used_V = torch.zeros(vocab_size, dtype=torch.int64, device=device)
        self.closed_hit_SV = torch.zeros_like(self.hit_SV)
        self.closed_dead = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, hit_SV: torch.Tensor) -> None:
        """Takes in how often a step chose each code at each scale, by all ranks together."""
        self.hit_SV += hit_SV.long()
        self.steps_used_V += hit_SV.sum(0) > 0
        self.steps += 1

    def dead_V(self, below: float) -> torch.Tensor:
        """(V,) bool: codes that at most this part of the window's steps used."""
        return self.steps_used_V <= below * self.steps

    def close(self, below: float) -> None:
        """Ends the window; what it held stays for reports."""
        self.closed_hit_SV.copy_(self.hit_SV)
        self.closed_dead.copy_(self.dead_V(below).sum())
        self.hit_SV.zero_()
        self.steps_used_V.zero_()
        self.steps = 0

    def percent(self) -> torch.Tensor:
        """() on the device: percent of the codebook used, at any scale, in the last closed window; before there is one,
        in the steps so far."""
        return 100.0 * (self._reported_SV().sum(0) > 0).float().mean()

    def _reported_SV(self) -> torch.Tensor:
        return torch.where(self.closed_hit_SV.any(), self.closed_hit_SV, self.hit_SV)

    def report(self) -> dict[str, Any]:
        """Of the last closed window (before there is one, of the steps so far): percent of codes used, in all and per
        scale, perplexity per scale, and how many codes counted as dead when it ended."""
        from var_fast.evaluation.reconstruction import code_use

        found = {f"train_{name}": value for name, value in code_use(self._reported_SV()).items()}
        return {**found, "dead_codes": int(self.closed_dead)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs besides `steps`: the very tensors in use."""
        names = ("hit_SV", "steps_used_V", "closed_hit_SV", "closed_dead")
        return {name: getattr(self, name) for name in names}
