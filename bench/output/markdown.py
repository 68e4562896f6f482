"""The report as GitHub Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.output.content import (
    Content,
    by_suite,
    columns_of,
    measured_rates,
    one_line,
    quality,
    run_time,
    timeline,
    warnings,
)
from bench.output.numbers import NONE, memory, ratios
from bench.rows import Report, Row
from var_fast.images import whole_file

HOW_TO_READ = """\
Each row is one implementation of one case; those of one case ran in turn in one process.

- median, p10-p90: the time of a call and its 10% and 90% points.
- throughput: images/s; of an operator GB/s or GFLOP/s, whichever bounds it.
- floor: the least time this device could take, by the shapes and by its measured copy and product rates.
- % of floor: floor / median; 100% cannot be beaten, but by data that stay in a cache.
- peak memory: the most that a call held beyond what was held before it.
- times as fast: x1.32 vs NAME means that NAME takes 1.32 times as long, the median over neighbouring samples.
- skipped: what could not run, or gave a wrong result, has a reason and no time.
"""


def write_markdown(report: Report, path: Path, plots: Sequence[Path] = ()) -> None:
    """Writes `path` whole or not at all. `plots` are shown from where they are, relative to `path`.

    Raises UserError if the file cannot be written.
    """
    text = "\n\n".join(block.strip("\n") for block in _blocks(report, Path(path), plots)) + "\n"
    with whole_file(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def escape(text: Any) -> str:
    """Text that Markdown shows as it is, also in a cell of a table."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # an underscore within a word, as in var_fast, is only itself
    return re.sub(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)", lambda match: "\\" + match[0], line)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are escaped here."""
    lines = [columns, ["---"] * len(columns), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _blocks(report: Report, path: Path, plots: Sequence[Path]) -> Iterator[str]:
    yield "# Benchmark"
    for line in warnings(report):
        yield f"**{escape(line)}**"
    yield markdown_table(["environment", ""], list(_environment(report.environment)))
    if rates := measured_rates(report.rates, with_names=True):
        yield f"Measured rates: {escape(rates)}."
    if report.command:
        yield f"```sh\n{one_line(report.command)}\n```"
    yield "## How to read"
    yield HOW_TO_READ
    for title, rows in by_suite(report).items():
        yield f"## {escape(title)}"
        yield _suite(rows, report.rates)
    yield from _content("Quality: fast modes held to the float32 reference", quality(report))
    yield from _content((report.timeline or {}).get("title") or "Timeline", timeline(report))
    if plots:
        yield "## Plots"
    for plot in plots:
        link = quote(Path(os.path.relpath(plot, path.parent)).as_posix())
        yield f"![{escape(Path(plot).stem.replace('_', ' '))}]({link})"
    if report.notes:
        yield "## Notes"
        yield "\n".join(f"- {escape(note)}" for note in report.notes)
    if line := run_time(report):
        yield f"{escape(line[0].upper() + line[1:])}."


def _suite(rows: list[Row], rates: dict[str, Any]) -> str:
    columns = list(columns_of(rows[0], rates))
    if all(row.joules_per_image is None for row in rows):
        columns.remove("J/image")
    table = []
    for row in rows:
        texts = columns_of(row, rates)
        is_skipped = row.median_s is None
        last = f"skipped: {row.skipped or 'no reason given'}" if is_skipped else ", ".join(ratios(row)) or NONE
        table.append([*(texts[name] for name in columns), last])
    return markdown_table([*columns, "times as fast"], table)


def _content(title: str, content: Content) -> Iterator[str]:
    if content.rows or content.skipped:
        yield f"## {escape(title)}"
    if content.rows:
        yield markdown_table(content.columns, content.rows)
    if content.skipped:
        yield "\n".join(f"- skipped: {escape(name)}: {escape(reason)}" for name, reason in content.skipped)


def _environment(environment: dict[str, Any]) -> Iterator[list[str]]:
    for name, value in environment.items():
        yield [name, _describe(name, value)]


def _describe(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "; ".join(f"{key.replace('_', ' ')}: {_describe(key, inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return memory(value) if name.endswith("_bytes") and isinstance(value, int) else str(value)
