"""Interleaved timing: the order, the number of calls, and what happens when one breaks off."""

import math
import time

import pytest
import torch

from bench.timing import LEAST_SAMPLE_S, REST_S, Timed, elapsed, interleave

CPU = torch.device("cpu")


class Clock:
    """In place of bench.timing's `time`: passes only while something sleeps."""

    now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def perf_counter(self):
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("bench.timing.time", clock := Clock())
    return clock


def recorder(name, log):
    return lambda value: log.append((name, value))


def test_each_round_has_an_order_of_its_own_and_calls_rotate_the_inputs():
    log = []
    timed = [Timed(recorder(name, log), estimate_s=1.0) for name in "abc"]
    interleave(timed, [(0,), (1,), (2,)], CPU, budget_s=0, least_rounds=20)
    rounds = ["".join(name for name, _ in log[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    followed = {turn[i : i + 2] for turn in rounds for i in range(2)}
    assert followed == {"ab", "ac", "ba", "bc", "ca", "cb"}  # none always comes after the same other
    assert [value for name, value in log if name == "a"][:4] == [0, 1, 2, 0]
    assert [len(one.samples_s) for one in timed] == [20, 20, 20]


def test_short_calls_share_a_sample_and_seconds_are_a_call(clock):
    calls = []

    def call():
        calls.append(0)
        clock.sleep(1e-3)

    one = Timed(call, estimate_s=1e-3)
    interleave([one], [()], CPU, budget_s=0, least_rounds=3)
    assert len(calls) == 3 * round(LEAST_SAMPLE_S["cpu"] / 1e-3)
    assert one.samples_s == pytest.approx([1e-3] * 3)


def test_rounds_go_on_until_the_budget_is_spent(clock):
    one = Timed(lambda: clock.sleep(0.01), estimate_s=0.01)
    interleave([one], [()], CPU, budget_s=0.2, least_rounds=2)
    assert 0.2 <= clock.now < 0.2 + 0.01 + REST_S
    assert len(one.samples_s) == math.ceil(0.2 / (0.01 + REST_S))


def test_one_that_fails_leaves_the_others_their_rounds():
    def fail():
        raise MemoryError

    good, bad = Timed(lambda: None, 1.0), Timed(fail, 1.0)
    interleave([bad, good], [()], CPU, 0, 3, failure=lambda error: "out of memory")
    assert bad.failed == "out of memory" and not bad.samples_s
    assert len(good.samples_s) == 3
    with pytest.raises(MemoryError):
        interleave([Timed(fail, 1.0)], [()], CPU, 0, 3)


def test_an_interrupt_leaves_whole_rounds():
    calls = []

    def interrupt():
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    first, second = Timed(lambda: None, 1.0), Timed(interrupt, 1.0)
    with pytest.raises(KeyboardInterrupt):
        interleave([first, second], [()], CPU, 0, 9)
    assert len(first.samples_s) == len(second.samples_s) == 2


def test_elapsed_is_seconds():
    assert 0.02 <= elapsed(lambda: time.sleep(0.02), CPU) < 0.5
