"""The speed tables of a README, made from committed reports.

    python bench/readme_table.py [--check] [FILE]

A table stands between two lines of its own:

    <!-- speed: bench/results/NAME.json suite=sample case=d16 dtype=float32 against=published -->
    <!-- /speed -->

The path is relative to FILE, as a link in it would be. `suite`, `case`, `implementation`, `dtype`, `batch` and
`device` choose rows, each by one value or several with commas, in quotes if there are spaces in it: case="d16 256 px".
`against` names the implementation that times are compared with, the reference if it is left out.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.output.content import commit, machine
from bench.output.markdown import escape, markdown_table
from bench.output.numbers import NONE, digits, images_per_s, seconds, spread, throughput
from bench.rows import Report, Row, ratio_to
from var_fast.errors import UserError
from var_fast.images import whole_file

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END, CLOSE = "<!-- speed:", "<!-- /speed -->", "-->"
FILTERS = ("suite", "case", "implementation", "dtype", "batch", "device")


def main(
    file: Annotated[Path, typer.Argument(help="The Markdown file with the markers.")] = ROOT / "README.md",
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit 1 if the file would change.")] = False,
) -> None:
    """Replace the text between the markers of FILE by the tables they name."""
    try:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        new, tables = fill(text, file)
        if not tables:
            raise UserError(f"{file}: has no marker, expected a line {BEGIN} REPORT.json {CLOSE}")
        if new != text and not check:
            with whole_file(file) as temporary:
                Path(temporary).write_text(new, encoding="utf-8")
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(2) from None
    if check and new != text:
        print(f"{file}: its tables differ from the reports: python bench/readme_table.py {file}", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{file}: {tables} table{'s' * (tables != 1)} {'as in the reports' if new == text else 'written'}")


def fill(text: str, file: Path) -> tuple[str, int]:
    """`text` of `file` with its tables made anew, and their number. Markers in fenced code are only text.

    Raises UserError, which names the line, for a marker that is wrong or whose report is missing or has no such rows.
    """
    lines: list[str] = []
    tables, opened, fence = 0, None, ""
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{file} line {number}"
        bare = line.strip()
        if opened is None and (bare.startswith("```") if not fence else bare == fence):
            fence = "" if fence else "`" * (len(bare) - len(bare.lstrip("`")))
        if fence or not bare.startswith(("<!-- speed", "<!-- /speed")):
            lines += [line] if opened is None else []
        elif bare == END:
            if opened is None:
                raise UserError(f"{where}: {END} has no {BEGIN} before it")
            lines.append(line)
            opened = None
        elif not bare.startswith(BEGIN) or not bare.endswith(CLOSE):
            raise UserError(f"{where}: is {bare!r}, expected {BEGIN} REPORT.json {CLOSE} or {END}")
        elif opened is not None:
            raise UserError(f"{where}: the table that begins at line {opened} has no {END}")
        else:
            opened, tables = number, tables + 1
            lines += [line, "", *_table(bare[len(BEGIN) : -len(CLOSE)], file, where), ""]
    if opened is not None:
        raise UserError(f"{file} line {opened}: {BEGIN} has no {END} after it")
    return "\n".join(lines), tables


def _table(marker: str, file: Path, where: str) -> Iterator[str]:
    """The lines of the table that the inner text of a marker asks for."""
    path, options = _parse(marker, where)
    report = Report.read(file.parent / path)
    against = options.pop("against", "reference")
    rows = [row for row in report.rows if all(str(getattr(row, k)) in v.split(",") for k, v in options.items())]
    if not any(row.median_s is not None for row in rows):
        raise UserError(f"{where}: {path} has no measured row of {marker.strip()}")
    peers = {row.implementation for row in report.rows}
    if against not in peers:
        raise UserError(f"{where}: against is {against!r}, expected one of {', '.join(sorted(peers))}")
    are_images = all(row.images for row in rows)
    # what all rows have in common goes without saying only if it was asked for: then it is in the text around
    varying = [name for name in ("suite", "case", "device") if len({getattr(row, name) for row in rows}) > 1]
    columns = [*varying, "implementation", "dtype", "batch", "median", "p10-p90"]
    columns += ["images/s" if are_images else "throughput", f"time / {against}'s"]
    yield from markdown_table(columns, [_cells(row, varying, are_images, against, report) for row in rows]).splitlines()
    yield ""
    environment = report.environment
    about = (machine(environment), f"torch {environment.get('torch', 'unknown')}", commit(environment))
    date = str(environment.get("date", "date unknown"))[:10]
    command = f", `{' '.join(report.command.split())}`" if report.command else ""
    yield f"{escape(', '.join(about))}, {escape(date)}{command}: [{Path(path).name}]({path})"


def _cells(row: Row, varying: list[str], are_images: bool, against: str, report: Report) -> list[str]:
    first = [*(getattr(row, name) for name in varying), row.implementation, row.dtype, str(row.batch)]
    if row.median_s is None:
        return [*first, f"skipped: {row.skipped or 'no reason given'}", NONE, NONE, NONE]
    rate = digits(images_per_s(row)) if are_images else throughput(row, report.rates)
    relative = ratio_to(row, against)
    return [*first, seconds(row.median_s), spread(row), rate, f"{1 / relative:.2f}" if relative else NONE]


def _parse(marker: str, where: str) -> tuple[str, dict[str, str]]:
    """The path and the options of a marker."""
    try:
        path, *words = shlex.split(marker)
    except ValueError:  # no word at all, or a quote that is not closed
        raise UserError(f"{where}: is {marker.strip()!r}, expected REPORT.json and options name=value") from None
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in (*FILTERS, "against"):
            raise UserError(f"{where}: {word!r}, expected name=value with one of {', '.join(FILTERS)}, against")
        options[name] = value
    return path, options


if __name__ == "__main__":
    typer.run(main)
