"""When a floating-point result is right: the tolerances that every operator and its gradients are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.case import Wrong
from bench.suites.checks import relative_error

# ||result - expected|| / ||expected||, `expected` in float64 of the same inputs
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT_TOLERANCE = {**TOLERANCE, torch.float64: 2e-12, torch.float32: 2e-5}


def check_close(what: str, result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Raises Wrong, which names `what`, for another shape, a larger relative error or anything not finite."""
    error = relative_error(result, expected)
    # written so that NaN, which compares false, is wrong
    if not error <= tolerance:
        raise Wrong(f"{what} is off by {error:.1e}, at most {tolerance:.0e} is right")


def check_all_close(
    names: Sequence[str], results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float
) -> None:
    """`check_close` for one tensor after the other."""
    if len(results) != len(names):
        raise Wrong(f"{len(results)} results, expected {len(names)}: {', '.join(names)}")
    for name, result, reference in zip(names, results, expected):
        check_close(name, result, reference, tolerance)
