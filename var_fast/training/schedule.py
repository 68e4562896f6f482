"""How long a run lasts, and what the learning rate, the weight decay and the trained scales are on the way."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from var_fast.errors import UserError

SHAPES = "cos, lin, lin0, lin00, lin followed by a number as in lin0.5, or exp"


@dataclass(frozen=True)
class Limits:
    """A run ends after `steps` steps or `minutes` minutes (all resumed parts together), whichever comes first."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise UserError("steps, epochs, minutes: got none, expected at least one limit")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps: got {self.steps}, expected 1 or more")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"minutes: got {self.minutes}, expected more than 0")

    @classmethod
    def of(cls, steps: int | None, epochs: float | None, minutes: float | None, *, images: int, batch: int) -> Limits:
        """The limits a user gave; an epoch is `images` images, `batch` a step."""
        if epochs is not None:
            if steps is not None:
                raise UserError("steps, epochs: got both, expected one of them")
            if not 0 < epochs < math.inf:
                raise UserError(f"epochs: got {epochs}, expected a number above 0")
            steps = max(1, round(epochs * math.ceil(images / batch)))
        return cls(steps, minutes)

    def progress(self, step: int, elapsed_s: float) -> float:
        """How much of the run is over, in [0, 1]. By the clock too: a run limited in time anneals fully."""
        by_steps = step / self.steps if self.steps else 0.0
        by_clock = elapsed_s / (60.0 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_clock))


def lr_factor(shape: str, progress: float, warmup: float, start: float, end: float) -> float:
    """Factor on the peak learning rate at `progress` of the run, in [0, 1]: the published schedules.

    From `start` up to 1 in a straight line until `warmup`, then down to `end`. shape "cos": half a cosine; "lin",
    "lin0" and "lin00": constant for the first 15%, 5%, 0% of the rest, then a line; "linT": a slow line until T, a
    steep one after it (for progressive training until T); "exp": constant for 15%, then exponential. Raises UserError
    for another shape.
    """
    if progress < warmup:
        return start + (1 - start) * progress / warmup
    done = (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0
    if shape == "cos":
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done))
    flat = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0, "exp": 0.15}.get(shape)
    if shape == "exp":
        return 1.0 if done < flat else math.exp((done - flat) / (1 - flat) * math.log(end))
    if flat is not None:
        return 1.0 if done < flat else end + (1 - end) * (1 - done) / (1 - flat)
    found = re.fullmatch(r"lin(0?\.\d+)", shape)
    if found is None:
        raise UserError(f"schedule: got {shape!r}, expected {SHAPES}")
    bend = float(found[1])
    middle = (1 + end + (1 - end) * (1 - bend)) / 2
    return 1 + (middle - 1) * done / bend if done < bend else end + (middle - end) * (1 - done) / (1 - bend)


def cosine_factor(step: int, progress: float, warmup_steps: int, end: float) -> float:
    """Factor on the peak learning rate: linear warm-up over `warmup_steps`, and half a cosine down to `end` at
    progress 1."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * (end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def weight_decay_at(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` to `end`, as the published code anneals it."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class ProgressiveTraining:
    """Training the first scales first (an option of the published code): which scale is the last one trained.

    Scale `first` until `warmup` of the run, then one more at even distances, all of them from `until` on. A new scale
    counts in the loss by a weight that grows to 1 over `ramp` of the run.
    """

    until: float
    first: int
    ramp: float
    warmup: float
    scales: int

    def stage(self, step: int, steps: int) -> int:
        """The last scale trained at this step."""
        last = self.scales - 1
        begin, end = self.warmup * steps, self.until * steps
        if step >= end:
            return last
        if step <= begin:
            return min(self.first, last)
        return min(last, self.first + round((step - begin) / (end - begin) * (last - self.first)))

    def newest_weight(self, step: int, steps: int) -> float:
        """The weight of the newest scale's tokens; 1 for those it all began with."""
        stage = self.stage(step, steps)
        if stage == self.stage(0, steps):
            return 1.0
        low, high = 0, step  # the first step of this stage, which never goes back
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.stage(middle, steps) >= stage else (middle + 1, high)
        return max(0.01, min(1.0, (step - low + 1) / max(1e-9, self.ramp * steps)))
