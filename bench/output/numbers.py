"""Numbers as text: times, rates, shares and sizes, the same in every form of the report."""

from __future__ import annotations

import math
from typing import Any

from bench.rows import Row

NONE = "-"


def digits(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 123, 12,346."""
    rounded = float(f"{value:.3g}")
    if rounded == 0:
        return "0"
    if abs(rounded) >= 100:
        return f"{value:,.0f}"
    return f"{rounded:.{2 - math.floor(math.log10(abs(rounded)))}f}"


def seconds(value: float | None) -> str:
    """A time in s, ms or us."""
    if value is None:
        return NONE
    factor, unit = _time_unit(value)
    return f"{digits(value * factor)} {unit}"


def spread(row: Row) -> str:
    """The 10% and the 90% point, in the unit of the second."""
    if row.p10_s is None or row.p90_s is None:
        return NONE
    factor, unit = _time_unit(row.p90_s)
    return f"{digits(row.p10_s * factor)}-{digits(row.p90_s * factor)} {unit}"


def _time_unit(value: float) -> tuple[float, str]:
    rounded = float(f"{value:.3g}")
    if rounded >= 1 or rounded == 0:
        return 1, "s"
    return (1e3, "ms") if rounded >= 1e-3 else (1e6, "us")


def bandwidth(bytes_per_s: float) -> str:
    return _with_prefix(bytes_per_s, "B/s")


def arithmetic(flops_per_s: float) -> str:
    return _with_prefix(flops_per_s, "FLOP/s")


def _with_prefix(value: float, unit: str) -> str:
    """In thousands of millions (G), the largest in T: what is compared should not change its unit too often."""
    rounded = float(f"{value:.3g}")
    return f"{digits(value / 1e12)} T{unit}" if rounded >= 1e12 else f"{digits(value / 1e9)} G{unit}"


def bound_by_arithmetic(row: Row, rates: dict[str, Any]) -> bool:
    """Whether the least time of the matrix products is longer than that of the memory traffic, by measured rates.

    Without a rate for both: whether there are matrix products at all.
    """
    flops_per_s = (rates.get("flops_per_s") or {}).get(row.dtype)
    bytes_per_s = rates.get("copy_bytes_per_s")
    if not flops_per_s or not bytes_per_s:
        return row.flops > 0
    return row.flops / flops_per_s > row.bytes / bytes_per_s


def throughput(row: Row, rates: dict[str, Any]) -> str:
    """images/s; of an operator on its own GB/s or GFLOP/s, whichever bounds it."""
    if row.median_s is None:
        return NONE
    if row.images:
        return f"{digits(images_per_s(row))} images/s"
    if bound_by_arithmetic(row, rates):
        return arithmetic(row.flops / row.median_s)
    return bandwidth(row.bytes / row.median_s) if row.bytes else NONE


def images_per_s(row: Row) -> float:
    return row.images_per_s if row.images_per_s is not None else row.images / row.median_s


def share_of_floor(row: Row) -> str:
    """floor / median: 100% is as fast as the measured rates of the device allow."""
    if row.floor_s is None or not row.median_s:
        return NONE
    return percent(row.floor_s / row.median_s)


def percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{100 * share:.0f}%" if share >= 0.0995 else f"{100 * share:.1f}%"


def agreement(share: float | None) -> str:
    """In percent, rounded down: only what is whole reads 100%."""
    if share is None:
        return NONE
    # the small number: 0.57 * 10000 is 5699.999...
    return "100%" if share >= 1 else f"{math.floor(share * 10_000 + 1e-6) / 100:.2f}%"


def memory(count: int | None) -> str:
    """Bytes in KiB, MiB, GiB."""
    if count is None:
        return NONE
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{digits(count / size)} {unit}"
    return f"{count} B"


def decibels(value: float | None) -> str:
    """None: the images are identical."""
    return "identical" if value is None else f"{value:.1f} dB"


def times(value: float) -> str:
    """x1.32"""
    return f"x{value:.2f}" if 0.1 <= value < 10 else f"x{digits(value)}"


def ratios(row: Row) -> list[str]:
    """x1.32 vs reference: this implementation is 1.32 times as fast."""
    return [f"{times(value)} vs {other}" for other, value in row.ratio.items() if other != row.implementation]
