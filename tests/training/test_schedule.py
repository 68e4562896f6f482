from __future__ import annotations

import math

import pytest

from var_fast.errors import UserError
from var_fast.training.schedule import Limits, ProgressiveTraining, lr_factor, weight_decay_at

# What lr_wd_annealing of the public code sets for peak 3, weight decay 0.05 to 0.08, 20 of 200 steps of warm-up,
# wp0 = 0.005, wpe = 0.1.
PUBLISHED = {
    "cos": {7: 1.05975, 50: 2.8171548314801558, 150: 0.7691982156574558},
    "lin": {7: 1.05975, 50: 2.944101215905357, 150: 1.1695366414722315},
    "lin0": {7: 1.05975, 50: 2.665774772125846, 150: 1.0780064686856807},
    "lin00": {7: 1.05975, 50: 2.5474860335195535, 150: 1.0391061452513966},
    "lin0.5": {7: 1.05975, 50: 2.7737430167597763, 150: 1.4086592178770951},
    "exp": {7: 1.05975, 50: 2.860342251662657, 150: 0.6297553456461096},
}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_learning_rates_are_the_published_ones(shape):
    for step, expected in PUBLISHED[shape].items():
        assert 3 * lr_factor(shape, step / 199, 20 / 199, 0.005, 0.1) == pytest.approx(expected, rel=1e-12)
    assert lr_factor(shape, 0.0, 20 / 199, 0.005, 0.1) == 0.005
    assert lr_factor(shape, 1.0, 20 / 199, 0.005, 0.1) == pytest.approx(0.1, rel=1e-12)


def test_weight_decay_is_the_published_one():
    for step, expected in {7: 0.05009149743534669, 50: 0.05443534211520992, 150: 0.07573143932671057}.items():
        assert weight_decay_at(0.05, 0.08, step / 199) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", ["step", "lin2", "linx", ""])
def test_unknown_shape_is_named(shape):
    with pytest.raises(UserError, match="schedule: got .*expected cos"):
        lr_factor(shape, 0.5, 0.0, 0.005, 0.1)


def test_progress_is_by_steps_or_by_the_clock_whichever_is_further():
    assert Limits(steps=10).progress(5, 1e9) == 0.5
    assert Limits(minutes=2).progress(10**9, 30) == 0.25
    assert Limits(steps=10, minutes=2).progress(5, 90) == 0.75
    assert Limits(steps=10).progress(20, 0) == 1.0


def test_epochs_are_steps():
    assert Limits.of(None, 2.0, None, images=10, batch=4).steps == 6  # an epoch ends with a step
    assert Limits.of(7, None, 3.0, images=10, batch=4) == Limits(7, 3.0)


@pytest.mark.parametrize("limits", [{}, {"steps": 0}, {"minutes": 0.0}, {"minutes": float("nan")}])
def test_bad_limits(limits):
    with pytest.raises(UserError):
        Limits(**limits)


@pytest.mark.parametrize(
    "given, words", [((3, 1.0, None), "got both"), ((None, 0.0, None), "above 0"), ((None, math.inf, None), "above 0")]
)
def test_bad_lengths(given, words):
    with pytest.raises(UserError, match=words):
        Limits.of(*given, images=10, batch=2)


def published_stage(step, steps, warmup, until, first, scales):
    """The rule of the public training script."""
    if step <= warmup * steps:
        return first
    if step >= steps * until:
        return scales - 1
    progress = min(max((step - warmup * steps) / (steps * until - warmup * steps), 0), 1)
    return first + round(progress * (scales - 1 - first))


def test_stages_and_their_weights_are_the_published_ones():
    steps, progressive = 400, ProgressiveTraining(until=0.8, first=2, ramp=0.02, warmup=0.05, scales=7)
    last, since = None, 0
    first_stage = True
    for step in range(steps):
        expected = published_stage(step, steps, 0.05, 0.8, 2, 7)
        assert progressive.stage(step, steps) == expected
        if expected != last:
            first_stage, last, since = last is None, expected, 0
        since += 1
        weight = 1 if first_stage else max(min(since / (0.02 * steps), 1), 0.01)
        assert progressive.newest_weight(step, steps) == pytest.approx(weight, rel=1e-12)
    assert progressive.stage(0, steps) == 2 and progressive.stage(steps - 1, steps) == 6
