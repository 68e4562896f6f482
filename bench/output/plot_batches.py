"""Images/s of one case, for each implementation, with the floor drawn in."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from bench.output.numbers import digits, images_per_s
from bench.output.plot_style import GREY, new_figure, plain_ticks, put_title, styles, tidy
from bench.rows import Report, Row


def draw(report: Report, rows: list[Row]) -> Figure:
    """`rows`: measured, of one suite, case and device. A panel for each dtype; bars where there is one batch."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    look = styles(row.implementation for row in report.rows if row.images)
    several = len({row.batch for row in rows}) > 1
    names = len({row.implementation for row in rows})
    width = max(6.5, 4.6 * len(dtypes))
    figure = new_figure(width, 4.6 if several else 1.9 + 0.4 * names)
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=several)[0]
    for axes, dtype in zip(panels, dtypes):
        own = [row for row in rows if row.dtype == dtype]
        if several:
            _lines(axes, own, look)
        else:
            _bars(axes, own, look)
        axes.set_title(dtype if several else f"{dtype}, batch {own[0].batch}", fontsize=10)
    if several:
        _scale(panels[0], rows)
        handles = {
            label: handle
            for axes in panels
            for handle, label in zip(*axes.get_legend_handles_labels())
            if not label.startswith("_")
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    first = rows[0]
    put_title(figure, f"{first.suite}: {first.case} on {first.device}", report)
    return figure


def _error(row: Row) -> tuple[float, float]:
    """From the median's images/s down to the 90% time's and up to the 10% time's."""
    if not row.p10_s or not row.p90_s:
        return 0.0, 0.0
    middle = images_per_s(row)
    return max(0.0, middle - row.images / row.p90_s), max(0.0, row.images / row.p10_s - middle)


def _floor(rows: list[Row]) -> dict[int, float]:
    """images/s that cannot be exceeded, by batch."""
    return {row.batch: row.images / row.floor_s for row in sorted(rows, key=lambda r: r.batch) if row.floor_s}


def _lines(axes, rows: list[Row], look) -> None:
    for name in dict.fromkeys(row.implementation for row in rows):
        own = sorted((row for row in rows if row.implementation == name), key=lambda row: row.batch)
        values = [images_per_s(row) for row in own]
        axes.errorbar(
            [row.batch for row in own],
            values,
            yerr=list(zip(*map(_error, own))),
            color=look[name].colour,
            marker=look[name].marker,
            markersize=6,
            linewidth=1.6,
            capsize=3,
            label=name,
        )
    if floor := _floor(rows):
        axes.plot(floor.keys(), floor.values(), color=GREY, linestyle="--", linewidth=1.6, label="floor of the device")
    axes.set_xscale("log", base=2)
    batches = sorted({row.batch for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(batches))
    axes.xaxis.set_major_formatter(plain_ticks())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch")
    tidy(axes)


def _scale(axes, rows: list[Row]) -> None:
    """Of all panels, which share it."""
    seen = [images_per_s(row) for row in rows] + [row.images / row.floor_s for row in rows if row.floor_s]
    # a linear scale shows small differences best, but not those of small numbers beside large ones
    if max(seen) > 20 * min(seen):
        axes.set_yscale("log")
        axes.set_ylim(min(seen) / 1.5, max(seen) * 1.5)
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(plain_ticks())
    else:
        axes.set_ylim(0, 1.08 * max(seen))
    axes.yaxis.set_major_formatter(plain_ticks())
    axes.set_ylabel("images/s")


def _bars(axes, rows: list[Row], look) -> None:
    values = [images_per_s(row) for row in rows]
    places = range(len(rows))
    axes.barh(
        places,
        values,
        height=0.62,
        xerr=list(zip(*map(_error, rows))),
        color=[look[row.implementation].colour for row in rows],
        error_kw=dict(ecolor=GREY, capsize=3),
    )
    ends = [value + _error(row)[1] for value, row in zip(values, rows)]
    for place, value, end in zip(places, values, ends):
        axes.annotate(
            digits(value),
            (end, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox=dict(facecolor="white", edgecolor="none", pad=1),
        )
    limit = 1.15 * max(ends)
    for floor in _floor(rows).values():
        axes.axvline(floor, color=GREY, linestyle="--", linewidth=1.6)
        axes.annotate(
            f"floor {digits(floor)}",
            (floor, 1),
            (-4, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
            color=GREY,
        )
        limit = max(limit, 1.05 * floor)
    axes.set_xlim(0, limit)
    axes.set_ylim(len(rows) - 0.5, -1.0)
    axes.set_yticks(list(places), [row.implementation for row in rows])
    axes.set_xlabel("images/s")
    tidy(axes, "x")
