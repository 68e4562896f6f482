"""How far a result is from what it should be."""

from __future__ import annotations

import torch


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """||result - expected|| / ||expected||; infinite where shapes differ, NaN where a value is."""
    if result.shape != expected.shape:
        return float("inf")
    difference = (result.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-300)).item()
