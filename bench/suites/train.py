"""Suite `train`: one step of the transformer: forward, backward, clipping and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bench.case import Case, Wrong
from bench.models import Models
from bench.suites.checks import relative_error
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
    """A training step of `module`: inputs -> (loss, norms of the gradients of all its parameters), without gradient.

    The learning rate is 0: AdamW does all its work, and every implementation finds the same weights at every step. The
    result raises Wrong before the optimizer sees a gradient that is not finite, which would spoil them.
    """
    parameters = list(module.parameters())
    if module not in _optimizers:
        _optimizers[module] = _optimizer(parameters)
    optimizer = _optimizers[module]

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            value = loss(*inputs)
            value.backward()
            gradients = [p.grad for p in parameters]
            norms_P = torch.stack(torch._foreach_norm(gradients))  # as clip_grad_norm_ does, which returns their norm
            norm = norms_P.norm()
            torch._foreach_mul_(gradients, (CLIP / (norm + 1e-6)).clamp(max=1.0))
            if not norm.isfinite():
                raise Wrong("the gradient is not finite")
            optimizer.step()
            return value.detach(), norms_P
        finally:  # what a step that broke off has left would be added to the next one's
            optimizer.zero_grad(set_to_none=True)

    return run


def forget_moments() -> None:
    """Twice the size of the weights, that suites to come may need."""
    _optimizers.clear()


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
    (loss, norms_P), (right_loss, right_norms_P) = result, expected
    differences = {
        "loss": abs(loss.double() / right_loss.double() - 1).item(),
        "gradient": relative_error(norms_P, right_norms_P),
    }
    for what, error in differences.items():
        if not error <= tolerance:
            raise Wrong(f"the {what} differs from the reference's by {error:.1e}, more than {tolerance:.0e}")
    # a part whose gradient is small has no weight in the whole: each must at least be there
    off_P = (norms_P.double() - right_norms_P.double()).abs() > 0.5 * right_norms_P.double()
    if off_P.any():
        raise Wrong(f"the gradients of {int(off_P.sum())} of {len(off_P)} parameters are far from the reference's")
