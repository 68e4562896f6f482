"""Number types of training: autocast as the published code uses it, and the scaler that float16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from var_fast.errors import UserError

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

# As in the published code: twice as much could overflow float16, which ends at 65504.
LARGEST_SCALE = 32768.0
# Below this, halving the scale after every overflow has not helped for 20 steps and more.
SMALLEST_SCALE = 1e-3


def lacks_products(name: str, device: torch.device) -> bool:
    """Whether this is known of a type of PRECISIONS: an x86 CPU on which torch's autocast would be slow in it."""
    instructions = {"bfloat16": "avx512_bf16", "float16": "avx512_fp16"}
    if device.type != "cpu" or name not in instructions or not hasattr(torch.cpu, "get_capabilities"):
        return False
    return not torch.cpu.get_capabilities().get(instructions[name], True)


class Precision:
    """One of "float32", "bfloat16" and "float16" on a device. Weights, optimizer and averages are float32 in all."""

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in PRECISIONS:
            raise UserError(f"precision: got {name!r}, expected one of {', '.join(PRECISIONS)}")
        self.dtype, self.device = PRECISIONS[name], device
        self.scaler = None
        if name == "float16":
            self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**11, growth_interval=1000)
            self.scaler.scale(torch.zeros((), device=device))  # now it has its state, which resuming may set

    def autocast(self) -> AbstractContextManager:
        """Around the forward."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward on."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the gradients are clipped."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step; none where float16 gradients have overflowed."""
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()
        self.scaler._scale.clamp_(max=LARGEST_SCALE)

    def norm_of_sound_step(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm; 0 where float16 has overflowed, which costs a step and is no failure, unless every step does."""
        if self.scaler is None:
            return norm
        lost = self.scaler._scale < SMALLEST_SCALE
        return torch.where(norm.isfinite() | lost, norm, 0.0)

    def facts(self) -> dict[str, Any] | None:
        """The scaler's state."""
        return None if self.scaler is None else self.scaler.state_dict()

    def set_facts(self, facts: dict[str, Any] | None) -> None:
        if self.scaler is not None and facts is not None:
            self.scaler.load_state_dict(facts)
