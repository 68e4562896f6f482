"""What a report says, as text in rows and columns, for those who print or write it."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.output.numbers import (
    NONE,
    agreement,
    arithmetic,
    bandwidth,
    decibels,
    digits,
    memory,
    percent,
    seconds,
    share_of_floor,
    spread,
    throughput,
)
from bench.rows import Report, Row


class Content(NamedTuple):
    """A table. `skipped`: (name, reason) of what has no numbers."""

    columns: list[str]
    rows: list[list[str]]
    skipped: list[tuple[str, str]] = []


def one_line(text: Any) -> str:
    return " ".join(str(text).split())


def by_suite(report: Report) -> dict[str, list[Row]]:
    """Rows by the title of their table: the suite and the device."""
    tables: dict[str, list[Row]] = {}
    for row in report.rows:
        tables.setdefault(f"{row.suite} on {row.device}", []).append(row)
    return tables


def columns_of(row: Row, rates: dict[str, Any]) -> dict[str, str]:
    """The columns of a measured row, all but its ratios."""
    return {
        "case": row.case,
        "implementation": row.implementation,
        "dtype": row.dtype,
        "batch": str(row.batch),
        "median": seconds(row.median_s),
        "p10-p90": spread(row),
        "throughput": throughput(row, rates),
        "floor": seconds(row.floor_s),
        "% of floor": share_of_floor(row),
        "peak memory": memory(row.peak_bytes),
        "J/image": NONE if row.joules_per_image is None else digits(row.joules_per_image),
    }


def quality(report: Report) -> Content:
    """The fast modes held to the float32 reference."""
    columns = ["mode", "dtype", "tokens agree", "by scale", "identical", "PSNR, same tokens", "PSNR, own tokens"]
    rows, skipped = [], []
    for entry in report.quality:
        mode, dtype = str(entry.get("mode", NONE)), str(entry.get("dtype", NONE))
        if entry.get("skipped"):
            skipped.append((f"{mode} {dtype}", one_line(entry["skipped"])))
            continue
        rows.append(
            [
                mode,
                dtype,
                agreement(entry.get("token_agreement")),
                " ".join(agreement(share) for share in entry.get("agreement_per_scale") or []) or NONE,
                f"{entry.get('images_identical', NONE)} of {entry.get('images', NONE)}",
                _psnr(entry, "psnr_same_tokens_db"),
                _psnr(entry, "psnr_free_db"),
            ]
        )
    return Content(columns, rows, skipped)


def _psnr(entry: dict[str, Any], name: str) -> str:
    return decibels(entry[name]) if name in entry else NONE


def timeline(report: Report) -> Content:
    """Where the time of the sampled image went, most first; the rest is the time in no operator."""
    line = report.timeline or {}
    totals = operator_totals(line)
    total = line.get("total_s") or sum(totals.values())
    ordered = list(totals.items())
    if (rest := total - sum(totals.values())) > 0.001 * total:
        ordered.append(("in no operator", rest))
    rows = [[name, seconds(value), percent(value / total) if total else NONE] for name, value in ordered]
    if rows:
        rows.append(["total", seconds(total), ""])
    return Content(["operator", "time", "share"], rows)


def operator_totals(timeline: dict[str, Any]) -> dict[str, float]:
    """Seconds of each operator, most first; from the spans if the totals are missing."""
    totals = dict(timeline.get("totals_s") or {})
    if not totals:
        for span in timeline.get("spans") or []:
            totals[span["operator"]] = totals.get(span["operator"], 0.0) + span["seconds"]
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def machine(environment: dict[str, Any]) -> str:
    """The device in a few words: NVIDIA H100, or AMD EPYC (2 threads)."""
    gpu, cpu = environment.get("gpu") or {}, environment.get("cpu") or {}
    if gpu.get("name"):
        return one_line(gpu["name"])
    threads = f" ({cpu['threads']} thread{'s' * (cpu['threads'] != 1)})" if cpu.get("threads") else ""
    return one_line(cpu.get("model") or "unknown machine") + threads


def commit(environment: dict[str, Any]) -> str:
    name = environment.get("commit")
    if not name:
        return "commit unknown"
    return f"commit {str(name)[:12]}{' with uncommitted changes' if environment.get('dirty') else ''}"


def measured_rates(rates: dict[str, Any], with_names: bool = False) -> str:
    """In one line, `with_names` of what reached them; "" if none were measured."""
    parts = {"copy": f"copy {bandwidth(rates['copy_bytes_per_s'])}"} if rates.get("copy_bytes_per_s") else {}
    products = rates.get("flops_per_s") or {}
    parts |= {dtype: f"products in {dtype} {arithmetic(rate)}" for dtype, rate in products.items() if rate}
    names = (rates.get("of") or {}) if with_names else {}
    return ", ".join(text + (f" ({names[key]})" if key in names else "") for key, text in parts.items())


def warnings(report: Report) -> list[str]:
    """What makes these numbers less than they seem."""
    lines = []
    if report.interrupted:
        lines.append("interrupted: only what was finished is here")
    nvml = report.environment.get("nvml") or {}
    if nvml.get("throttled"):
        lines.append(f"the GPU was throttled: {', '.join(map(str, nvml['throttled']))}")
    return lines


def run_time(report: Report) -> str:
    """Seconds of the run and where they went; "" if unknown."""
    parts = dict(report.seconds)
    total = parts.pop("total", None)
    if not total:
        return ""
    words = [f"{name.replace('_', ' ')} {value:.1f} s ({percent(value / total)})" for name, value in parts.items()]
    return f"the run took {total:.1f} s" + (f": {', '.join(words)}" if words else "")
