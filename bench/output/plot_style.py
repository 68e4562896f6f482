"""How all plots look: colours that colour-blind readers can tell apart (Okabe and Ito 2008), a marker beside each."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bench.output.content import commit, machine
from bench.rows import Report

GREY = "#666666"


class Style(NamedTuple):
    colour: str
    marker: str


STYLES = [
    Style("#000000", "s"),
    Style("#0072B2", "o"),
    Style("#E69F00", "^"),
    Style("#D55E00", "D"),
    Style("#CC79A7", "v"),
    Style("#009E73", "P"),
    Style("#56B4E9", "X"),
    Style("#888888", "*"),
]
# the same colour in every report
USUAL = ("reference", "var_fast", "compile", "published", "published-autocast", "flex", "sdpa", "hmar")


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Of each implementation; those without a usual style take what the others leave."""
    names = list(dict.fromkeys(names))
    chosen = {name: STYLES[USUAL.index(name)] for name in USUAL if name in names}
    free = cycle([style for style in STYLES if style not in chosen.values()] or STYLES)
    return chosen | {name: next(free) for name in sorted(names) if name not in chosen}


def new_figure(width: float, height: float) -> Figure:
    """In inches, 130 pixels each. No global state of matplotlib is read or changed."""
    with rc_context({"font.size": 10}):
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes, grid: str = "both") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def plain_ticks() -> FuncFormatter:
    """0.5, 2, 1000: without needless zeros and powers."""
    return FuncFormatter(lambda value, _: f"{value:.10g}")


def put_title(figure: Figure, title: str, report: Report) -> None:
    """The title, and below it where the numbers come from."""
    environment = report.environment
    about = f"{machine(environment)}, torch {environment.get('torch', 'unknown')}, {commit(environment)}"
    figure.suptitle(f"{title}\n", fontsize=12, fontweight="bold")
    below = 1 - 0.33 / figure.get_figheight()
    figure.text(0.5, below, about, ha="center", va="top", fontsize=8, color=GREY)
