"""Suite `train`: one step of the transformer: forward, backward, clipping and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bench.case import Case, Wrong
from bench.models import Models
from bench.work import train_work

INPUT_SETS = 2
CLIP = 2.0

# Implementations that train the same module share its moments: twice the size of the weights.
_optimizers: WeakKeyDictionary[nn.Module, torch.optim.Optimizer] = WeakKeyDictionary()


@dataclass(frozen=True)
class TrainSubject:
    """The inputs are (labels (B,), teacher-forcing input (B, L - first_l, Cvae), true tokens (B, L))."""

    models: Models


def cases(models: Models, device: torch.device, dtypes: Sequence[torch.dtype], batch: int) -> list[Case]:
    """One case for each dtype but float16, which needs loss scaling; the inputs are those of random tokens."""
    generator = torch.Generator().manual_seed(batch)
    var = models.var

    def draw() -> tuple[torch.Tensor, ...]:
        target_BL = torch.randint(var.V, (batch, var.L), generator=generator).to(device)
        scales = target_BL.split([end - begin for begin, end in var.begin_ends], dim=1)
        with torch.no_grad():
            x_BLCv_wo_first_l = models.vae.quantize.idxBl_to_var_input(scales)
        return torch.randint(var.num_classes, (batch,), generator=generator).to(device), x_BLCv_wo_first_l, target_BL

    inputs = [draw() for _ in range(INPUT_SETS)]
    return [
        Case(
            suite="train",
            name=models.name,
            device=device,
            dtype=dtype,
            batch=batch,
            images=batch,
            work=train_work(var, batch, dtype.itemsize),
            inputs=inputs,
            subject=TrainSubject(models),
            check=_same_step if dtype == torch.float32 else _similar_step,
        )
        for dtype in dtypes
        if dtype != torch.float16
    ]


def step(module: nn.Module, loss: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A training step of `module`: inputs -> (loss, norm of the gradient), both without gradient.

    The learning rate is 0: AdamW does all its work, and every implementation finds the same weights at every step.
    """
    parameters = list(module.parameters())
    if module not in _optimizers:
        _optimizers[module] = _optimizer(parameters)
    optimizer = _optimizers[module]

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = loss(*inputs)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach(), norm.detach()

    return run


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW that has its moments already, so that they do not count as memory of the first implementation's step."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _same_step(result, expected) -> None:
    _compare(result, expected, 1e-4)


def _similar_step(result, expected) -> None:
    _compare(result, expected, 2e-2)


def _compare(result, expected, tolerance: float) -> None:
    for what, found, right in zip(("loss", "gradient's norm"), result, expected):
        error = abs(found.double() / right.double() - 1).item()
        if not error <= tolerance:
            raise Wrong(f"the {what} differs from the reference's by {error:.1e}, more than {tolerance:.0e}")
