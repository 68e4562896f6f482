"""The report as pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.rows import Report, Row
from var_fast.errors import UserError
from var_fast.images import whole_file


def plots_problem() -> str | None:
    """Why there can be no plots, in one line; None if there can."""
    try:
        import matplotlib.backends.backend_agg  # noqa: F401
    except ImportError as error:
        return f"no plots: matplotlib cannot be imported ({error}); pip install matplotlib"
    return None


def write_plots(report: Report, directory: Path) -> list[Path]:
    """Writes PNG files into `directory`, which is made if need be, and returns them; none if matplotlib is missing.

    <suite>_<case>.png: images/s against batch. ops_roofline.png: operators with matrix products; ops_bandwidth.png:
    those without. timeline.png: the time of a sampled image. Each is written whole or not at all. Raises UserError if
    they cannot be written.
    """
    if plots_problem():
        return []
    directory, written = Path(directory), []
    for name, figure in _figures(report):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the directory {str(directory)!r}: {error.strerror}") from None
        with whole_file(directory / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": "bench/run.py"})
        written.append(directory / f"{name}.png")
    return written


def _figures(report: Report) -> Iterator[tuple]:
    """(file name without its end, figure)."""
    from bench.output import plot_batches, plot_operators, plot_timeline

    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in report.rows:
        if row.median_s and row.images:
            cases.setdefault((row.suite, row.case, row.device), []).append(row)
    names = {key: _file_name(*key[:2]) for key in cases}
    uses = Counter(names.values())
    for key, rows in cases.items():
        name = names[key] if uses[names[key]] == 1 else f"{names[key]}_{_file_name(key[2])}"
        yield name, plot_batches.draw(report, rows)
    operators = [row for row in report.rows if row.median_s and not row.images and row.bytes]
    if products := [row for row in operators if row.flops]:
        yield "ops_roofline", plot_operators.draw_roofline(report, products)
    if traffic := [row for row in operators if not row.flops]:
        yield "ops_bandwidth", plot_operators.draw_bandwidth(report, traffic)
    if report.timeline and report.timeline.get("spans"):
        yield "timeline", plot_timeline.draw(report.timeline)


def _file_name(*words: str) -> str:
    return "_".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.") for word in words)
