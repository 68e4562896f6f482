"""Where the time of one sampled image goes: a row for each operator, time from left to right."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from bench.output.content import operator_totals
from bench.output.numbers import percent, seconds
from bench.output.plot_style import GREY, STYLES, new_figure, tidy

TURNS = [style.colour for style in STYLES if style.colour != "#000000"]


def draw(timeline: dict[str, Any]) -> Figure:
    """`timeline` has spans; see Report and the schema."""
    spans = timeline["spans"]
    totals = operator_totals(timeline)
    total = timeline.get("total_s") or max(span["begin_s"] + span["seconds"] for span in spans)
    drawn = {span["operator"] for span in spans}
    order = sorted(totals, key=lambda name: name not in drawn)  # idle time, which has no spans, comes last
    figure = new_figure(11, 2.0 + 0.36 * len(order))
    axes = figure.subplots()
    for place, name in enumerate(order):
        bars = [(1e3 * span["begin_s"], 1e3 * span["seconds"]) for span in spans if span["operator"] == name]
        colour = TURNS[place % len(TURNS)]
        # a thin edge, or short spans would not be seen at all
        axes.broken_barh(bars, (place - 0.36, 0.72), facecolor=colour, edgecolor=colour, linewidth=0.2)
        text = f"{seconds(totals[name])}  {percent(totals[name] / total)}"
        axes.annotate(
            text, (1, place), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center"
        )
    parts = [(scale["begin_s"], f"{scale['patch_num']}x{scale['patch_num']}") for scale in timeline.get("scales") or []]
    if decoder := timeline.get("decoder"):
        parts.append((decoder["begin_s"], "decoder"))
    _parts(axes, parts, total)
    axes.set_xlim(0, 1e3 * total)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("ms" + ("; dotted: where a scale or the decoder begins" if parts else ""))
    axes.set_title(
        f"{timeline.get('title') or 'timeline'}: {seconds(total)}", fontweight="bold", pad=44 if parts else 10
    )
    tidy(axes, "x")
    return figure


def _parts(axes, parts: list[tuple[float, str]], total: float) -> None:
    """A line where each begins; its name where that does not cover the next one's."""
    labelled = float("inf")
    for begin, name in reversed(parts):
        axes.axvline(1e3 * begin, color=GREY, linewidth=0.8, linestyle=":")
        if labelled - begin < 0.012 * total:
            continue
        labelled = begin
        axes.annotate(
            name,
            (1e3 * begin, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            rotation=90,
            color=GREY,
        )
