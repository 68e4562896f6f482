"""How long a run lasts and what the learning rate is on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from var_fast.errors import UserError

SHAPES = ("cosine", "linear")


@dataclass(frozen=True)
class Limits:
    """A run ends after `steps` steps or `minutes` minutes (all resumed parts together), whichever comes first."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise UserError("steps, minutes: got neither, expected at least one limit")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps: got {self.steps}, expected 1 or more")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"minutes: got {self.minutes}, expected more than 0")

    def progress(self, step: int, elapsed_s: float) -> float:
        """How much of the run is over, in [0, 1]. By the clock too: a run limited in time anneals fully."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = elapsed_s / (60.0 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_clock))


def lr_factor(
    step: int, progress: float, *, warmup_steps: int, shape: str = "cosine", final: float = 0.01, hold: float = 0.5
) -> float:
    """Factor on the peak learning rate: linear warm-up over `warmup_steps`, then down to `final` at progress 1.

    shape "cosine": half a cosine over the whole run. "linear": constant until progress `hold`, then a straight line.
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    if shape == "cosine":
        down = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif shape == "linear":
        down = min(1.0, (1.0 - progress) / max(1e-9, 1.0 - hold))
    else:
        raise UserError(f"schedule: got {shape!r}, expected one of {', '.join(SHAPES)}")
    return warm * (final + (1.0 - final) * down)
