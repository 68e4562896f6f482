"""Measures one group of cases: check every result, then time all implementations in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.case import CannotRun, Case, Implementation, Implementations, Wrong
from bench.memory import peak_bytes
from bench.nvml import joules
from bench.peers.base import Peer
from bench.rows import Row, without_paths
from bench.timing import Timed, interleave, replays, synchronize
from bench.work import floor_s
from var_fast.errors import UserError

EXPLAINS_ITSELF_S = 0.3
"""A first call longer than this is its own estimate of the calls to come, unless it compiles."""


@dataclass
class Method:
    """How long to measure: at least `least_rounds` rounds, `budget_s` seconds, and `times_warm_up` times what the first
    calls took (but not more than 12 rounds for that). A group that would end after `deadline` (of time.monotonic) gets
    fewer rounds, down to 2, or none. `reference_in_half`: the plain modules run under autocast too, though they ran in
    float32."""

    budget_s: float
    least_rounds: int
    times_warm_up: float = 0.0
    deadline: float = float("inf")
    reference_in_half: bool = True


@dataclass
class Seconds:
    """Where the time of a run goes. `timed`: calls whose time counts; `warm_up`: the first calls, which are checked."""

    timed: float = 0.0
    warm_up: float = 0.0


@dataclass
class _Entry:
    """An implementation on its way through the measurement."""

    case: Case
    row: Row
    implementation: Implementation | None
    timed: Timed | None = None
    result: Any = field(default=None, repr=False)


def measure(
    cases: Sequence[Case],
    peers: Sequence[Peer],
    rates: dict[str, Any],
    method: Method,
    seconds: Seconds,
    rows: list[Row],
    on_step: Callable[[str], None] = lambda text: None,
) -> None:
    """Adds to `rows` those of `cases`, which differ in dtype only, for all that `peers` have; those that cannot run say
    why. Interrupted, it adds what has been timed so far."""
    for peer in peers:
        peer.begin()
    entries = _entries(cases, peers, rates, method)
    begin = time.monotonic()
    for entry in entries:
        if entry.implementation is not None and time.monotonic() < method.deadline:
            on_step(f"{entry.row.implementation}, {entry.row.dtype}: check")
            _warm_up(entry, entries)
    for entry in entries:
        entry.result = None
    warm_up_s = time.monotonic() - begin
    seconds.warm_up += warm_up_s
    ready = [entry for entry in entries if entry.timed is not None]
    round_s = sum(entry.timed.estimate_s for entry in ready)
    left_s = method.deadline - time.monotonic()
    if 2 * round_s > left_s:
        for entry in entries:
            entry.row.skipped = entry.row.skipped or (
                f"no time left in a quick report, one round takes {round_s:.0f} s: name it by --suite and --models"
            )
    elif ready:
        begin = time.monotonic()
        try:
            interleave(
                [entry.timed for entry in ready],
                cases[0].inputs,
                cases[0].device,
                max(method.budget_s, min(method.times_warm_up * warm_up_s, 12 * round_s)),
                method.least_rounds,
                deadline=method.deadline,
                failure=reason,
                on_round=lambda rounds: on_step(f"round {rounds}"),
            )
        finally:
            for entry in ready:
                _fill_in(entry, ready)
            rows += [entry.row for entry in entries if entry.row.median_s is not None or entry.row.skipped]
            seconds.timed += time.monotonic() - begin
        begin = time.monotonic()
        _measure_energy(ready)
        seconds.timed += time.monotonic() - begin
        return
    rows += [entry.row for entry in entries]


def _measure_energy(ready: list[_Entry]) -> None:
    for entry in ready:
        if entry.case.images and entry.timed.failed is None:
            call, inputs = entry.implementation.call, entry.case.inputs[0]
            energy_j = joules(lambda call=call, inputs=inputs: call(*inputs), entry.case.device)
            entry.row.joules_per_image = None if energy_j is None else energy_j / entry.case.images


def _entries(cases: Sequence[Case], peers: Sequence[Peer], rates: dict[str, Any], method: Method) -> list[_Entry]:
    """Float32 first, the reference first of each type: the others are held to its results."""
    cases = sorted(cases, key=lambda case: case.dtype != torch.float32)
    in_float32 = cases[0].dtype == torch.float32
    entries: dict[tuple, _Entry] = {}
    for case in cases:
        for peer in peers:
            for name, found in _implementations(peer, case).items():
                half = case.suite != "ops" and case.dtype != torch.float32
                if name == "reference" and half and in_float32 and not method.reference_in_half:
                    continue
                implementation = found if isinstance(found, Implementation) else None
                dtype = (implementation and implementation.dtype) or case.dtype
                row = Row(
                    suite=case.suite,
                    case=case.name,
                    implementation=name,
                    device=case.device.type,
                    dtype=str(dtype).removeprefix("torch."),
                    batch=case.batch,
                    images=case.images,
                    flops=sum(stage.flops for stage in case.work),
                    bytes=sum(stage.bytes for stage in case.work),
                    skipped=without_paths(str(found)) if isinstance(found, CannotRun) else None,
                )
                rate = rates["flops_per_s"].get(row.dtype)
                row.floor_s = None if rate is None else floor_s(case.work, rate, rates["copy_bytes_per_s"])
                entries.setdefault(row.key, _Entry(case, row, implementation))
    return list(entries.values())


def _implementations(peer: Peer, case: Case) -> Implementations:
    try:
        return getattr(peer, case.suite)(case)
    except Exception as error:  # other people's code may fail in any way while it is set up
        return {peer.name: CannotRun(reason(error))}


def _warm_up(entry: _Entry, entries: list[_Entry]) -> None:
    """Calls it once or more, until its time is known; leaves the reason in the row if it cannot run or is wrong."""
    case, implementation = entry.case, entry.implementation
    inputs = case.inputs[0]
    try:
        begin = time.perf_counter()
        entry.result, entry.row.peak_bytes = peak_bytes(lambda: implementation.call(*inputs), case.device)
        synchronize(case.device)
        estimate_s = time.perf_counter() - begin
        if implementation.expected is not None:
            case.check(entry.result, implementation.expected(*inputs))
        elif entry.row.implementation != "reference":
            case.check(entry.result, _reference_result(entry, entries))
        if estimate_s < EXPLAINS_ITSELF_S or implementation.compiles:
            # the first call may have compiled, or filled caches that stay: neither is memory of a call
            _, entry.row.peak_bytes = peak_bytes(lambda: implementation.call(*inputs), case.device)
            estimate_s = _estimate(implementation.call, case)
        entry.timed = Timed(implementation.call, estimate_s)
        if case.suite == "ops" and (graphs := replays(implementation.call, case.inputs, case.device)) is not None:
            # in a model on a GPU the launches of an operator run ahead of it
            entry.row.graph = True
            entry.timed = Timed(graphs, _estimate(graphs, case))
    except Exception as error:
        entry.row.skipped = reason(error)


def _estimate(call: Callable, case: Case) -> float:
    """Seconds a call, the best of a few more."""
    best, begin = float("inf"), time.perf_counter()
    for count in range(5):
        synchronize(case.device)
        start = time.perf_counter()
        call(*case.inputs[count % len(case.inputs)])
        synchronize(case.device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > 0.1:
            break
    return best


def _reference_result(entry: _Entry, entries: list[_Entry]) -> Any:
    """The result of the reference in the same type, else in the first type that it ran in. Raises Wrong without one."""
    found = [other for other in entries if other.row.implementation == "reference" and other.result is not None]
    same = [other for other in found if other.case is entry.case]
    if not found:
        raise Wrong("not checked, for the reference did not run: no time for what may be wrong")
    return (same + found)[0].result


def reason(error: Exception) -> str:
    """Why something is left out, in one line without paths."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "out of memory"
    if isinstance(error, CannotRun | Wrong | UserError):
        return without_paths(text)
    # Other people's code, a compiler's included, may raise anything; the report goes on without it.
    first = (text.strip() or "no message").splitlines()[0]
    return without_paths(f"{type(error).__name__}: {first[:200]}")


def _fill_in(entry: _Entry, ready: list[_Entry]) -> None:
    row, case, samples = entry.row, entry.case, entry.timed.samples_s
    row.skipped = entry.timed.failed
    if row.skipped is not None or not samples:
        return
    row.samples = len(samples)
    row.median_s = median(samples)
    row.p10_s, row.p90_s = (float(x) for x in np.quantile(samples, (0.1, 0.9)))
    if case.images:
        row.images_per_s = case.images / row.median_s
    for other in ready:
        if other is not entry and other.timed.failed is None:
            label = other.row.implementation + ("" if other.row.dtype == row.dtype else f" {other.row.dtype}")
            row.ratio[label] = median(theirs / ours for theirs, ours in zip(other.timed.samples_s, samples))
