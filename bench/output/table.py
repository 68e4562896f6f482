"""The report on a terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bench.output.content import (
    Content,
    by_suite,
    columns_of,
    commit,
    machine,
    measured_rates,
    one_line,
    quality,
    run_time,
    timeline,
    warnings,
)
from bench.output.numbers import NONE, ratios, seconds
from bench.rows import Report, Row


def print_report(console: Console, report: Report) -> None:
    """A table for each suite, the quality gate, where the time of an image goes, notes.

    Made for 100 columns: long texts fold, nothing is cut off.
    """
    environment = report.environment
    about = (machine(environment), f"torch {environment.get('torch', 'unknown')}", commit(environment))
    console.print(Text(", ".join(about), style="bold"))
    if rates := measured_rates(report.rates):
        console.print(Text(f"measured rates: {rates}"))
    for line in warnings(report):
        console.print(Text(line, style="bold red"))
    for title, rows in by_suite(report).items():
        console.print()
        _print_suite(console, title, rows, report.rates)
    _print_content(console, "quality: fast modes held to the float32 reference", quality(report))
    _print_content(console, (report.timeline or {}).get("title") or "timeline", timeline(report))
    console.print()
    for note in report.notes:
        console.print(Text(f"note: {one_line(note)}"))
    if line := run_time(report):
        console.print(Text(line))


def _print_suite(console: Console, title: str, rows: list[Row], rates: dict[str, Any]) -> None:
    """Case, dtype, batch and floor head the implementations that share them: as columns they would not fit."""
    columns = ["implementation", "median", "p10-p90", "throughput", "% of floor", "peak memory"]
    columns += ["J/image"] if any(row.joules_per_image is not None for row in rows) else []
    texts = [columns_of(row, rates) for row in rows]
    # in two lines, so that a header is no wider than its numbers
    header = ["\n".join(["", *name.rsplit(" ", 1)][-2:]) for name in columns]
    widths = widths_of([header, *([text[name] for name in columns] for text in texts)])
    room = console.width - 2 - sum(width + 2 for width in widths)
    console.print(Text(title, style="bold underline"))
    console.print(grid(widths, [*header, "\ntimes as fast"], "dim"))
    explained: set[tuple[str, str]] = set()
    for (case, dtype, batch), same in groupby(rows, key=lambda row: (row.case, row.dtype, row.batch)):
        same = list(same)
        floor = next((row.floor_s for row in same if row.floor_s is not None), None)
        console.print(Text(f"{case}, {dtype}, batch {batch}, floor {seconds(floor)}", style="bold"))
        for row in same:
            if row.median_s is None:
                reason = (row.implementation, one_line(row.skipped or "no reason given"))
                text = "skipped as above" if reason in explained else f"skipped: {reason[1]}"
                explained.add(reason)
                console.print(grid(widths[:1], [row.implementation, text], "dim"))
                continue
            cells, others = columns_of(row, rates), ratios(row)
            beside = len(others) <= 2 and max(map(len, others), default=0) <= room
            last = ("\n".join(others) or NONE) if beside else ""
            console.print(grid(widths, [*(cells[name] for name in columns), last]))
            if not beside:
                console.print(Padding(Text(", ".join(others)), (0, 0, 0, 6)))


def widths_of(rows: list[list[str]]) -> list[int]:
    """Of each column, the longest of all lines in its cells."""
    return [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*rows)]


def grid(widths: list[int], cells: list[str], style: str = "") -> Padding:
    """A line in columns of these widths, the first to the left, the others to the right, and a last one that folds."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for place, width in enumerate(widths):
        table.add_column(width=width, justify="right" if place else "left", overflow="fold")
    table.add_column(overflow="fold")
    table.add_row(*map(Text, cells), style=style)
    return Padding(table, (0, 0, 0, 2))


def _plain_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _print_content(console: Console, title: str, content: Content) -> None:
    if not content.rows and not content.skipped:
        return
    console.print()
    console.print(Text(title, style="bold underline"))
    if content.rows:
        table = _plain_table(*content.columns)
        for cells in content.rows:
            table.add_row(*map(Text, cells))
        console.print(table)
    for name, reason in content.skipped:
        console.print(Padding(Text(f"{name}  skipped: {reason}", style="dim"), (0, 0, 0, 2)))
