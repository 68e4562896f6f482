from __future__ import annotations

import pytest

from var_fast.errors import UserError
from var_fast.training.schedule import Limits, lr_factor


@pytest.mark.parametrize(
    "step, progress, shape, expected",
    [
        (0, 0.0, "cosine", 0.1),  # warm-up: 1 of 10 steps
        (4, 0.0, "cosine", 0.5),
        (99, 0.5, "cosine", 0.55),  # 0.1 + 0.9 / 2
        (99, 1.0, "cosine", 0.1),
        (99, 0.3, "linear", 1.0),
        (99, 0.75, "linear", 0.55),  # half of the way from hold = 0.5
        (99, 1.0, "linear", 0.1),
    ],
)
def test_values(step, progress, shape, expected):
    assert lr_factor(step, progress, warmup_steps=10, shape=shape, final=0.1) == pytest.approx(expected, abs=1e-12)


def test_unknown_shape_is_named():
    with pytest.raises(UserError, match="'step'.*cosine"):
        lr_factor(0, 0.0, warmup_steps=1, shape="step")


def test_progress_is_by_steps_or_by_the_clock_whichever_is_further():
    assert Limits(steps=10).progress(5, 1e9) == 0.5
    assert Limits(minutes=2).progress(10**9, 30) == 0.25
    assert Limits(steps=10, minutes=2).progress(5, 90) == 0.75
    assert Limits(steps=10).progress(20, 0) == 1.0


@pytest.mark.parametrize("limits", [{}, {"steps": 0}, {"minutes": 0.0}, {"minutes": float("nan")}])
def test_bad_limits(limits):
    with pytest.raises(UserError):
        Limits(**limits)
