"""A group's measurement, with invented implementations whose times and results are known."""

import time

import pytest
import torch

from bench.case import CannotRun, Case, Implementation, Stage, Wrong
from bench.measure import Method, Seconds, measure
from bench.peers.base import Peer

CPU = torch.device("cpu")
RATES = {"flops_per_s": {"float32": 1e9}, "copy_bytes_per_s": 1e9}


def check(result, expected):
    if result != expected:
        raise Wrong(f"{result} is not {expected}")


def make_case(dtype=torch.float32, images=4):
    return Case("sample", "toy", CPU, dtype, 4, images, [Stage(1e6, 5e6)], [(1,), (1,)], None, check)


class Toy(Peer):
    def __init__(self, **implementations):
        self.implementations = implementations

    def sample(self, case):
        return self.implementations


def sleeper(seconds, result=1):
    def call(value):
        time.sleep(seconds)
        return result

    return Implementation(call)


def run(*peers, cases=None, method=None):
    rows, seconds = [], Seconds()
    measure(cases or [make_case()], peers, RATES, method or Method(0.0, 5), seconds, rows)
    return {(row.implementation, row.dtype): row for row in rows}, seconds


def test_times_spread_throughput_floor_and_ratios():
    rows, seconds = run(Toy(reference=sleeper(0.02)), Toy(fast=sleeper(0.01)))
    fast, reference = rows["fast", "float32"], rows["reference", "float32"]
    assert 0.010 <= fast.p10_s <= fast.median_s <= fast.p90_s < 0.019
    assert fast.images_per_s == 4 / fast.median_s
    assert fast.floor_s == 5e-3  # the bytes bind
    assert fast.ratio["reference"] == pytest.approx(2.0, rel=0.3)
    assert reference.ratio["fast"] == pytest.approx(0.5, rel=0.3)
    assert fast.samples == 5
    assert seconds.timed >= 0.15 and seconds.warm_up >= 0.03


def test_a_wrong_result_has_no_time():
    rows, _ = run(Toy(reference=sleeper(0.001)), Toy(bad=sleeper(0.001, result=2)))
    assert rows["bad", "float32"].skipped == "2 is not 1"
    assert rows["bad", "float32"].median_s is None
    assert rows["reference", "float32"].median_s is not None


def test_own_expectation_and_own_type():
    own = Implementation(lambda value: 7, expected=lambda value: 7, dtype=torch.float16)
    rows, _ = run(Toy(reference=sleeper(0.001)), Toy(own=own))
    row = rows["own", "float16"]
    assert row.skipped is None and row.floor_s is None  # no rate was measured for float16
    assert "reference float32" in row.ratio


def test_reasons_are_listed():
    def explode(value):
        raise ZeroDivisionError("the first line\nthe second")

    def fill(value):
        raise torch.OutOfMemoryError("CUDA out of memory")

    peers = Toy(reference=sleeper(0.001), no=CannotRun("needs a GPU"), bug=Implementation(explode))
    rows, _ = run(peers, Toy(big=Implementation(fill)))
    assert rows["no", "float32"].skipped == "needs a GPU"
    assert rows["bug", "float32"].skipped == "ZeroDivisionError: the first line"
    assert rows["big", "float32"].skipped == "out of memory"
    assert rows["reference", "float32"].median_s is not None


def test_types_are_timed_together_and_half_results_held_to_float32_where_the_reference_has_no_half():
    cases = [make_case(), make_case(torch.bfloat16)]
    method = Method(0.0, 3, reference_in_half=False)
    rows, _ = run(Toy(reference=sleeper(0.002)), Toy(fast=sleeper(0.001)), cases=cases, method=method)
    assert set(rows) == {("reference", "float32"), ("fast", "float32"), ("fast", "bfloat16")}
    assert set(rows["fast", "bfloat16"].ratio) == {"reference float32", "fast float32"}
    rows, _ = run(Toy(reference=sleeper(0.001)), Toy(half=sleeper(0.001, result=3)), cases=cases, method=method)
    assert rows["half", "bfloat16"].skipped == "3 is not 1"


def test_what_has_no_time_left_says_so():
    late = Method(0.0, 3, deadline=time.monotonic() + 0.05)
    rows, seconds = run(Toy(reference=sleeper(0.1)), method=late)
    assert "no time left" in rows["reference", "float32"].skipped
    assert seconds.timed == 0


def test_an_interrupt_keeps_the_rounds_that_were_timed():
    calls = []

    def interrupt(value):
        calls.append(value)
        if len(calls) == 40:
            raise KeyboardInterrupt
        time.sleep(0.005)
        return 1

    rows = []
    with pytest.raises(KeyboardInterrupt):
        measure([make_case()], [Toy(reference=Implementation(interrupt))], RATES, Method(9.0, 100), Seconds(), rows)
    assert rows[0].median_s == pytest.approx(0.005, rel=0.5) and 1 < rows[0].samples < 40


def test_without_a_reference_nothing_has_a_time():
    def fill(value):
        raise MemoryError

    rows, _ = run(Toy(reference=Implementation(fill)), Toy(fast=sleeper(0.001)))
    assert rows["reference", "float32"].skipped == "out of memory"
    assert "not checked" in rows["fast", "float32"].skipped and rows["fast", "float32"].median_s is None


def test_a_half_type_alone_is_held_to_the_reference_in_it():
    method = Method(0.0, 3, reference_in_half=False)
    peers = [Toy(reference=sleeper(0.001)), Toy(fast=sleeper(0.001, result=2))]
    rows, _ = run(*peers, cases=[make_case(torch.bfloat16)], method=method)
    assert rows["reference", "bfloat16"].median_s > 0 and rows["fast", "bfloat16"].skipped == "2 is not 1"
    rows, _ = run(*peers, cases=[make_case(torch.bfloat16), make_case()], method=method)
    assert {row.skipped for row in rows.values() if row.implementation == "fast"} == {"2 is not 1"}


def test_a_peer_that_fails_while_it_is_set_up_is_a_row_without_its_paths():
    class Broken(Peer):
        name = "broken"

        def sample(self, case):
            raise AssertionError("no such file: /home/somebody/VAR/models/var.py")

    rows, _ = run(Toy(reference=sleeper(0.001)), Broken())
    assert rows["broken", "float32"].skipped == "AssertionError: no such file: var.py"
    assert rows["reference", "float32"].median_s > 0


def test_a_compiling_first_call_is_neither_estimate_nor_memory():
    calls = []

    def compiled(value):
        calls.append(torch.ones(2**24 if not calls else 1))  # 64 MiB in the first
        time.sleep(0.4 if len(calls) == 1 else 0.005)
        return 1

    rows, _ = run(Toy(reference=sleeper(0.005)), Toy(compile=Implementation(compiled, compiles=True)))
    row = rows["compile", "float32"]
    assert row.median_s == pytest.approx(0.005, rel=0.4) and (row.peak_bytes is None or row.peak_bytes < 2**23)
