import json

import pytest
import torch

from bench import rates
from bench.rates import Candidate, faster, fastest, measure

CPU = torch.device("cpu")


def clock_of(seconds):
    """A clock that says how long each call took, from a list by name of the call."""

    def clock(call, device):
        return seconds[call()].pop(0)

    return clock


def test_rates_of_this_cpu():
    found = measure("cpu", [torch.float32])
    assert set(found) == {"copy_bytes_per_s", "flops_per_s", "of"}
    assert set(found["flops_per_s"]) == {"float32"}
    assert set(found["of"]) == {"copy", "float32"}
    assert json.loads(json.dumps(found)) == found
    # No CPU that runs torch is outside of these: a wrong unit or a count of operations off by 1000 is.
    assert 5e8 < found["copy_bytes_per_s"] < 2e12
    assert 1e9 < found["flops_per_s"]["float32"] < 1e14


def test_half_types_are_no_slower_than_float32():
    assert faster(("linear", 2.0), ("convolution", 1.0)) == ("linear", 2.0)
    assert faster(("linear", 1.0), ("convolution", 2.0)) == ("convolution, in float32", 2.0)
    assert faster(None, ("convolution", 2.0)) == ("convolution, in float32", 2.0)
    found = measure("cpu", [torch.float16, torch.float32])["flops_per_s"]
    assert found["float16"] >= found["float32"]
    assert set(measure("cpu", [torch.float16])["flops_per_s"]) == {"float16"}


def test_the_best_repetition_of_the_best_candidate_counts():
    seconds = {"a": [9.0, 0.4, 0.2, 0.4, 0.4, 0.4, 0.4], "b": [9.0] + [0.3] * 6}
    candidates = [Candidate(name, 1.0, lambda name=name: name) for name in "ab"]
    assert fastest(iter(candidates), CPU, 1e9, clock_of(seconds)) == ("a", 1 / 0.2)
    assert seconds == {"a": [], "b": []}  # one call not counted, six counted


def test_time_ends_the_repetitions_and_leaves_out_what_is_larger():
    seconds = {"small": [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], "large": [1.0], "medium": [0.2] + [0.1] * 6}
    candidates = [
        Candidate("small", 1.0, lambda: "small"),
        Candidate("large", 10.0, lambda: "large"),
        Candidate("medium", 2.0, lambda: "medium"),
    ]
    assert fastest(iter(candidates), CPU, 1.0, clock_of(seconds)) == ("medium", 2 / 0.1)
    assert seconds["large"] == [1.0]
    seconds = {"small": [5.0, 5.0, 5.0]}
    assert fastest(iter(candidates[:1]), CPU, 1.0, clock_of(seconds)) == ("small", 1 / 5)
    assert seconds == {"small": [5.0]}


def test_a_product_that_this_device_lacks_is_left_out(monkeypatch):
    def lacking():
        raise RuntimeError("no such kernel")

    seconds = {"b": [9.0] + [1.0] * 6}
    candidates = [Candidate("a", 1.0, lacking), Candidate("b", 1.0, lambda: "b")]
    assert fastest(iter(candidates), CPU, 1e9, clock_of(seconds)) == ("b", 1.0)
    assert fastest(iter(candidates[:1]), CPU) is None
    monkeypatch.setattr(rates, "_candidates", lambda device, dtype: iter(candidates[:1]))
    found = measure("cpu", [torch.float32])
    assert found["flops_per_s"] == {}
    assert set(found["of"]) == {"copy"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_are_counted_right(dtype, monkeypatch):
    monkeypatch.setitem(rates.CONVOLUTIONS, "cpu", ((1, 8, 4),))
    monkeypatch.setitem(rates.PRODUCTS, "cpu", ((3, 5, 7),))
    flops = {candidate.name: candidate.flops for candidate in rates._candidates(CPU, dtype)}
    expected = {
        "3x3 convolution, 1 x 8 channels x 4 x 4": 2 * 16 * 8 * 8 * 9,
        "linear, 3 x 5 -> 7": 2 * 3 * 5 * 7,
        "packed linear, 3 x 5 -> 7": 2 * 3 * 5 * 7,
    }
    if dtype == torch.float32:
        del expected["packed linear, 3 x 5 -> 7"]
    assert flops == expected
    for candidate in rates._candidates(CPU, dtype):
        if not candidate.name.startswith("packed"):
            assert candidate.call().numel() in (8 * 16, 21)


def test_the_copy_is_far_beyond_the_cache(monkeypatch):
    monkeypatch.setattr(rates, "COPIES", 1)
    monkeypatch.setattr(rates, "last_level_cache_bytes", lambda device: 40 * 2**20)
    assert rates._copy(CPU)[0] == "160 MiB"
    monkeypatch.setattr(rates, "last_level_cache_bytes", lambda device: 2**20)
    assert rates._copy(CPU)[0] == "128 MiB"
