"""Timing in turn: every implementation once a round, so that what slows the machine for a while slows them all."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch

LEAST_SAMPLE_S = {"cpu": 5e-3, "cuda": 2e-3}
"""A sample shorter than this holds several calls, or the clock and the launch would be part of what is measured."""

REST_S = 5e-3
"""Before a sample on a CPU: OpenMP's threads spin for a while after the call before, and would slow this one's."""


@dataclass
class Timed:
    """A call under measurement: seconds a call of every round, or why it broke off."""

    call: Callable[..., Any]
    estimate_s: float
    samples_s: list[float] = field(default_factory=list)
    failed: str | None = None


def replays(call: Callable[..., Any], inputs: Sequence[tuple], device: torch.device) -> Callable[..., None] | None:
    """`call` on each set of `inputs` in turn as CUDA graphs, which leave the time of launches out; None where it cannot
    be captured. It has run on the first set before, so that nothing is compiled or loaded any more."""
    graphs: list[torch.cuda.CUDAGraph] = []
    if device.type != "cuda":
        return None
    try:
        for one in inputs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
                call(*one)
            graphs.append(graph)
    except RuntimeError:  # it waits for the device, or copies from it
        torch.cuda.synchronize(device)
        return None
    turn = cycle(graphs)
    return lambda *_: next(turn).replay()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of `run`: device events on CUDA, the monotonic clock on a CPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleave(
    timed: Sequence[Timed],
    inputs: Sequence[tuple],
    device: torch.device,
    budget_s: float,
    least_rounds: int,
    most_rounds: int = 200,
    deadline: float = math.inf,
    failure: Callable[[Exception], str | None] = lambda error: None,
    on_round: Callable[[int], None] = lambda rounds: None,
) -> None:
    """Fills in the samples: at least `least_rounds` rounds, then more until `budget_s` is spent. After `deadline` (of
    time.monotonic) 2 rounds are enough.

    Each round has an order of its own, the same in every run; each call takes the next set of `inputs`.
    `failure(error)` gives the reason to leave an implementation out, None to raise. KeyboardInterrupt leaves whole
    rounds only.
    """
    runs = [(one, _samples(one, inputs, device)) for one in timed]
    order = random.Random(0)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin, rounds = time.perf_counter(), 0
        while rounds < most_rounds and (rounds < least_rounds or time.perf_counter() - begin < budget_s):
            if rounds >= 2 and time.monotonic() > deadline:
                break
            found = []
            for one, sample in order.sample(runs, len(runs)):
                if one.failed is None:
                    try:
                        found.append((one, sample()))
                    except Exception as error:
                        one.failed = failure(error)
                        if one.failed is None:
                            raise
            for one, seconds in found:
                one.samples_s.append(seconds)
            rounds += 1
            on_round(rounds)
            if not found:
                break
    finally:
        if was_enabled:
            gc.enable()


def _samples(one: Timed, inputs: Sequence[tuple], device: torch.device) -> Callable[[], float]:
    calls = max(1, math.ceil(LEAST_SAMPLE_S[device.type] / max(one.estimate_s, 1e-7)))
    turn = cycle(inputs)

    def run() -> None:
        for _ in range(calls):
            one.call(*next(turn))

    def sample() -> float:
        if device.type == "cpu":
            time.sleep(REST_S)
        return elapsed(run, device) / calls

    return sample
