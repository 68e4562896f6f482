"""Operators beside the limits of the device: a roofline (Williams et al. 2009) of those with matrix products, and the
bandwidth of those without."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from bench.output.numbers import arithmetic, bandwidth, digits
from bench.output.plot_style import GREY, new_figure, plain_ticks, put_title, styles, tidy
from bench.rows import Report, Row

DTYPE_LINES = ("-", "--", "-.", ":")


def draw_roofline(report: Report, rows: list[Row]) -> Figure:
    """`rows`: measured operators with matrix products. Points carry the number of their case, which the key names."""
    figure = new_figure(10.5, max(5.2, 1.4 + 0.2 * len(_labels(rows))))
    _roofline(figure.subplots(), rows, report.rates, styles(row.implementation for row in rows))
    put_title(figure, f"operators with matrix products on {_devices(rows)}", report)
    return figure


def draw_bandwidth(report: Report, rows: list[Row]) -> Figure:
    """`rows`: measured operators without matrix products, which would have no place in the roofline."""
    figure = new_figure(10.5, 1.6 + 0.26 * len(rows) + 0.2 * len(_labels(rows)))
    _bandwidth(figure.subplots(), rows, report.rates, styles(row.implementation for row in rows))
    put_title(figure, f"operators without matrix products on {_devices(rows)}", report)
    return figure


def _devices(rows: list[Row]) -> str:
    return ", ".join(dict.fromkeys(row.device for row in rows))


def _labels(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(f"{row.case}, {row.dtype}, batch {row.batch}" for row in rows))


def _roofline(axes, rows: list[Row], rates, look) -> None:
    labels = _labels(rows)
    peaks = {dtype: peak for dtype in dict.fromkeys(row.dtype for row in rows) if (peak := _product_rate(rates, dtype))}
    highest = max([*peaks.values(), *(row.flops / row.median_s for row in rows)])
    unit, prefix = (1e12, "T") if highest >= 1e13 else (1e9, "G")
    for row in rows:
        style, place = look[row.implementation], (row.flops / row.bytes, row.flops / row.median_s / unit)
        axes.plot(*place, style.marker, color=style.colour, markersize=8, markeredgecolor="white", zorder=3)
        number = labels.index(f"{row.case}, {row.dtype}, batch {row.batch}") + 1
        axes.annotate(str(number), place, (6, 2), textcoords="offset points", fontsize=8, color=style.colour, zorder=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    copy = rates.get("copy_bytes_per_s")
    intensities = [row.flops / row.bytes for row in rows]
    ridges = [peak / copy for peak in peaks.values()] if copy else []
    left, right = min(intensities + ridges) / 4, max(intensities + ridges) * 4
    for (dtype, peak), line in zip(peaks.items(), DTYPE_LINES * len(peaks)):
        begin = peak / copy if copy else left
        axes.plot([begin, right], [peak / unit, peak / unit], line, color=GREY, linewidth=1.6)
        text = f"products in {dtype}: {arithmetic(peak)}"
        axes.annotate(
            text, (right, peak / unit), (0, 3), textcoords="offset points", ha="right", fontsize=8, color=GREY
        )
    if copy:
        end = max(ridges, default=right)
        axes.plot([left, end], [copy * left / unit, copy * end / unit], color=GREY, linewidth=1.6)
        text = f"copy: {bandwidth(copy)}"
        axes.annotate(
            text, (left, copy * left / unit), (8, 0), textcoords="offset points", va="center", fontsize=8, color=GREY
        )
    axes.set_xlim(left, right)
    axes.set_xlabel("FLOP of matrix products / byte that must move")
    axes.set_ylabel(f"{prefix}FLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain_ticks())
        axis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(plain_ticks())
    tidy(axes)
    names = dict.fromkeys(row.implementation for row in rows)
    handles = [Line2D([], [], linestyle="", marker=look[n].marker, color=look[n].colour, label=n) for n in names]
    handles += [Line2D([], [], linestyle="", label=f"{number} {label}") for number, label in enumerate(labels, 1)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, frameon=False, handlelength=1)


def _product_rate(rates, dtype: str) -> float | None:
    return (rates.get("flops_per_s") or {}).get(dtype)


def _bandwidth(axes, rows: list[Row], rates, look) -> None:
    """A bar for each implementation, together by case."""
    place, ticks, limit = 0.0, [], 0.0
    for label in _labels(rows):
        first = place
        for row in (row for row in rows if _labels([row]) == [label]):
            rate = row.bytes / row.median_s / 1e9
            axes.barh(place, rate, height=0.85, color=look[row.implementation].colour)
            axes.annotate(
                f"{digits(rate)}  {row.implementation}",
                (rate, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                bbox=dict(facecolor="white", edgecolor="none", pad=1),
            )
            place, limit = place + 1, max(limit, rate)
        ticks.append(((first + place - 1) / 2, label))
        place += 0.8
    if copy := rates.get("copy_bytes_per_s"):
        axes.axvline(copy / 1e9, color=GREY, linestyle="--", linewidth=1.6)
        axes.annotate(
            f"copy {bandwidth(copy)}",
            (copy / 1e9, 1),
            (0, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=GREY,
        )
        limit = max(limit, copy / 1e9)
    axes.set_xlim(0, 1.2 * limit)
    axes.set_ylim(place - 0.8 - 0.4, -0.6)
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.set_xlabel("GB/s: bytes that must move / time")
    axes.set_title(" ", fontsize=8)  # room for the label of the line
    tidy(axes, "x")
