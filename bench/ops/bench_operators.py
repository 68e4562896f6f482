"""Every operator on small shapes, under pytest-benchmark: python -m pytest bench/ops/bench_operators.py

Implementations: the reference and the fast backends that run here. On a CPU in float32, on a GPU in bfloat16 too.
With --benchmark-autosave, then --benchmark-compare, two versions of the code can be compared. Not part of the tests.
"""

from __future__ import annotations

import torch

from bench.case import Implementation
from bench.suites.ops import backend_implementations, cases, reference_implementation
from bench.timing import synchronize

SMALL_CACHE = 2**20
"""Small inputs are in the cache anyway: a few sets of them do."""


def pytest_generate_tests(metafunc):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # phi is a convolution, and float32 means float32
    found = {}
    for dtype in [torch.float32] + ([torch.bfloat16] if device.type == "cuda" else []):
        for case in cases(device, dtype, "small", cache_bytes=SMALL_CACHE):
            implementations = {"reference": reference_implementation(case), **backend_implementations(case)}
            for name, implementation in implementations.items():
                if isinstance(implementation, Implementation):
                    found[f"{case.name} {str(dtype).removeprefix('torch.')} {name}"] = case, implementation
    metafunc.parametrize("case, implementation", found.values(), ids=found)


def test_operator(benchmark, case, implementation):
    case.check(implementation.call(*case.inputs[0]), implementation.expected(*case.inputs[0]))
    benchmark.group = f"{case.name} {str(case.dtype).removeprefix('torch.')}"
    calls = 0

    def call():
        nonlocal calls
        calls += 1
        implementation.call(*case.inputs[calls % len(case.inputs)])
        synchronize(case.device)

    benchmark(call)
