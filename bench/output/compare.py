"""Two reports side by side: what became slower, what faster."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from bench.output.content import one_line
from bench.output.numbers import NONE, seconds, times
from bench.output.table import grid, widths_of
from bench.rows import Report, Row, ratio_to

LEAST = 0.05
"""A change of less than this is none."""

STYLES = {"slower": "bold red", "faster": "bold green", "": ""}


class Change(NamedTuple):
    """`factor`: the new time over the old one, the reference's own change taken out if `relative`. `verdict`: slower,
    faster, or "" if that is within the spread of either report or within 5%."""

    factor: float
    relative: bool
    verdict: str


def print_comparison(console: Console, old: Report, new: Report) -> None:
    """A row for each that both reports have, then what only one has.

    The ratio to the reference is what another machine would also give, so that it is judged where there is one; the
    times of other rows, the reference's own, are judged only if the environments are the same.
    """
    different = differences(old.environment, new.environment)
    if different:
        console.print(Text("the environments differ: times are not comparable, ratios may be", style="bold yellow"))
        for name, (then, now) in different.items():
            console.print(Text(f"  {name}: {then}, now {now}"))
    for report, name in ((old, "old"), (new, "new")):
        if report.interrupted:
            console.print(Text(f"the {name} report was interrupted", style="bold yellow"))
    old_rows, new_rows = ({row.key: row for row in report.rows} for report in (old, new))
    both = [
        (then, now)
        for key, now in new_rows.items()
        if (then := old_rows.get(key)) and then.median_s is not None and now.median_s is not None
    ]
    if both:
        _print_both(console, both, not different)
    else:
        console.print("no row was measured in both reports")
    _print_only(console, "only in the old report", old_rows, new_rows)
    _print_only(console, "only in the new report", new_rows, old_rows)


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What bears on times and is not the same: (then, now) by name."""
    names = ("cpu model", "cpu threads", "gpu name", "gpu driver", "torch", "triton", "cuda")
    values = {name: (_value(old, name), _value(new, name)) for name in names}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def _value(environment: dict[str, Any], name: str) -> str:
    value: Any = environment
    for key in name.split():
        value = value.get(key) if isinstance(value, dict) else None
    return "none" if value is None else one_line(value)


def change(old: Row, new: Row, times_count: bool) -> Change:
    """Both rows are measured. The verdict is by the ratio to the reference, and by the time if `times_count`."""
    then, now = (ratio_to(row, "reference") for row in (old, new))
    least = max(LEAST, _spread(old), _spread(new))
    factors = [(then / now, True)] if then and now and new.implementation != "reference" else []
    # a change of what both share slows both: only the time shows it
    factors += [(new.median_s / old.median_s, False)] if times_count or not factors else []
    for factor, relative in factors:
        if max(factor, 1 / factor) - 1 > least and (relative or times_count):
            return Change(factor, relative, "slower" if factor > 1 else "faster")
    return Change(*factors[0], "")


def _against_reference(row: Row) -> str:
    ratio = None if row.implementation == "reference" else ratio_to(row, "reference")
    return times(ratio) if ratio else NONE


def _spread(row: Row) -> float:
    """From the 10% to the 90% point, relative to the median."""
    if row.p10_s is None or row.p90_s is None:
        return 0.0
    return (row.p90_s - row.p10_s) / row.median_s


HEADER = ["\nimplementation", "\nthen", "\nnow", "time\nnow/then", "vs reference\nthen", "vs reference\nnow"]


def _print_both(console: Console, both: list[tuple[Row, Row]], times_count: bool) -> None:
    lines = [_line(then, now) for then, now in both]
    widths, verdicts, heading = widths_of([HEADER, *lines]), [], ""
    console.print(grid(widths, [*HEADER, ""], "dim"))
    for (then, now), line in zip(both, lines):
        if _case(now) != heading:
            heading = _case(now)
            console.print(Text(heading, style="bold"))
        verdicts.append(change(then, now, times_count).verdict)
        console.print(grid(widths, [*line, verdicts[-1]], STYLES[verdicts[-1]]))
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("slower", "faster"))
    console.print(
        Text(
            f"{len(both)} rows in both: {counts} by more than 5% and more than the p10-p90 spread of either report, "
            f"by the ratio to the reference{' or by the time' if times_count else ''}"
        )
    )


def _line(then: Row, now: Row) -> list[str]:
    """The cells under HEADER."""
    old, new = (_against_reference(row) for row in (then, now))
    change_of_time = f"{now.median_s / then.median_s:.2f}"
    return [now.implementation, seconds(then.median_s), seconds(now.median_s), change_of_time, old, new]


def _print_only(console: Console, title: str, rows: dict[tuple, Row], others: dict[tuple, Row]) -> None:
    """Rows measured here and not there, with the reason there if it is known."""
    only = [row for row in rows.values() if row.median_s is not None and _time(others.get(row.key)) is None]
    if only:
        console.print(Text(f"{title}:", style="bold"))
    for row in only:
        other = others.get(row.key)
        reason = f", skipped in the other: {one_line(other.skipped or 'no reason given')}" if other else ""
        console.print(Text(f"  {_case(row)}, {row.implementation}: {seconds(row.median_s)}{reason}"))


def _time(row: Row | None) -> float | None:
    return None if row is None else row.median_s


def _case(row: Row) -> str:
    return f"{row.suite} {row.case}, {row.dtype}, batch {row.batch}, {row.device}"
