"""AdamW as both trainers use it: what decays, clipping, one step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def weight_groups(model: nn.Module, weight_decay: float, bare: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """AdamW groups: decay on matrices and kernels; none on vectors and biases, nor on names that contain a word of
    `bare`. Both have an entry `decays`, 1.0 or 0.0, for schedules of the weight decay.
    """
    decayed, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            bare_one = p.ndim < 2 or name.endswith("bias") or any(word in name for word in bare)
            (others if bare_one else decayed).append(p)
    return [
        {"params": decayed, "weight_decay": weight_decay, "decays": 1.0},
        {"params": others, "weight_decay": 0.0, "decays": 0.0},
    ]


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float | None = None) -> None:
    """The learning rate, and the decay of the groups that decay, of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if weight_decay is not None:
            group["weight_decay"] = weight_decay * group["decays"]


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Scales the gradients down to a norm of at most `limit` (0: leaves them) and returns their norm, () on the device.

    Of sharded parameters the norm is that of the whole. Nothing is waited for, a norm that is not finite included: the
    loop finds it before anything is saved.
    """
    norm = nn.utils.clip_grad_norm_(list(parameters), limit if limit > 0 else float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def clip_and_step(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """One clipped step; the gradients are dropped after it. Returns their norm, as clip_gradients does."""
    norm = clip_gradients(parameters, limit)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
