"""Where the time of one sampled image goes: which operator ran when, as the profiler saw it."""

from __future__ import annotations

import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import var_fast.engine.sampler
import var_fast.models.autoencoder
import var_fast.models.block
import var_fast.models.quantizer
import var_fast.models.var
from var_fast import ops
from var_fast.models import VAR, VQVAE
from var_fast.ops.backend import FAST_BACKENDS

# The modules that call operators by names of their own.
CALLERS = (
    var_fast.models.autoencoder,
    var_fast.models.block,
    var_fast.models.quantizer,
    var_fast.models.var,
    var_fast.engine.sampler,
)
IDLE, OTHER, PRODUCTS = "idle/python", "other", "matrix products"
WHOLE, OPERATOR, SCALE, DECODER = "whole", "op:", "scale:", "part:decoder"
"""Names of the ranges that are put around the call, its operators, its scales and its decoder."""

PRODUCT_CALLS = (
    "linear",
    "_linear_pointwise",
    "addmm",
    "mm",
    "bmm",
    "matmul",
    "baddbmm",
    "addbmm",
    "_addmm_activation",
)
CALLS = (  # parts of the names of aten's operators
    ("attention", "attention"),
    ("convolution", "convolution"),
    ("conv2d", "convolution"),
    ("upsample", "resampling"),
    ("pool2d", "resampling"),  # F.interpolate's mode "area"
)
CASTS = ("to", "_to_copy", "copy_")
KERNELS = (  # parts of the names of kernels that no operator is known to have launched (a CUDA graph)
    ("gemm", PRODUCTS),
    ("nvjet", PRODUCTS),
    ("fprop", "convolution"),
    ("conv2d", "convolution"),
    ("upsample", "resampling"),
    ("flash", "attention"),
    ("fmha", "attention"),
)
MOST_SPANS = 2000
FINENESS = 4000
"""Neighbours closer than this part of the whole are drawn as one."""
DIGITS = 7  # of seconds


class Event(NamedTuple):
    """Seconds. `launcher`: of a kernel, the aten operator that launched it, where known."""

    begin: float
    end: float
    name: str
    launcher: str | None = None


class Span(NamedTuple):
    begin: float
    end: float
    operator: str


def record(call: Callable[[], Any], device: torch.device | str, title: str) -> dict[str, Any]:
    """Runs `call`, the sampling of an image by a Sampler or a VAR, once under the profiler, which slows Python down.

    Returns {"title", "total_s", "spans": [{"operator", "begin_s", "seconds"}], "totals_s": {operator: seconds},
    "scales": [{"scale", "patch_num", "begin_s"}], "decoder": {"begin_s", "seconds"} or None}, times from the call's
    begin. On CUDA the times of kernels, else of the calls. Operators of var_fast own all that runs in them; what is
    left is matrix products, convolution, attention, resampling and other. The totals, with "idle/python", sum up to
    `total_s`; the spans are a picture of at most MOST_SPANS, where neighbours too close to be told apart are one.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    quiet = {"KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "99")}  # else it prints that it starts and stops
    with patch.dict(os.environ, quiet), _ranges(), profile(activities=activities) as profiler, record_function(WHOLE):
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())["traceEvents"]
    return {"title": title, **timeline_of_trace(trace)}


@contextmanager
def _ranges() -> Iterator[None]:
    """Names for the profiler around the operators, the scales and the decoder; the library is as it was afterwards."""
    with ExitStack() as stack:
        for module in CALLERS:
            for name in FAST_BACKENDS:
                if getattr(module, name, None) is getattr(ops, name):
                    stack.enter_context(patch.object(module, name, _ranged(OPERATOR + name, getattr(ops, name))))
        stack.enter_context(patch.object(VQVAE, "fhat_to_img", _ranged(DECODER, VQVAE.fhat_to_img)))
        stack.enter_context(patch.object(VAR, "sample_scales", _ranged_scales(VAR.sample_scales)))
        yield


def _ranged(name: str, function: Callable) -> Callable:
    @wraps(function)
    def wrapped(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return wrapped


def _ranged_scales(sample_scales: Callable) -> Callable:
    @wraps(sample_scales)
    def wrapped(var: VAR, *args, **kwargs):
        scales = sample_scales(var, *args, **kwargs)
        for si, pn in enumerate(var.patch_nums):
            with record_function(f"{SCALE}{si}:{pn}"):
                f_hat_BChw = next(scales)
            yield f_hat_BChw

    return wrapped


def timeline_of_trace(trace: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What `record` returns but the title, from the events of a Chrome trace (times in microseconds).

    The device's events count where there are any. The profiler repeats our ranges on the device, from the first to the
    last kernel that was launched in them.
    """
    events = [event for event in trace if event.get("ph") == "X" and event.get("dur") is not None]
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_kind.setdefault(event.get("cat", ""), []).append(event)
    whole = next(event for event in by_kind["user_annotation"] if event["name"] == WHOLE)
    begin = whole["ts"]

    def times(event: dict[str, Any], launcher: str | None = None) -> Event:
        start = (event["ts"] - begin) * 1e-6
        return Event(start, start + event["dur"] * 1e-6, event["name"], launcher)

    kernels = [event for kind in ("kernel", "gpu_memcpy", "gpu_memset") for event in by_kind.get(kind, ())]
    if kernels:
        ranges = [times(event) for event in by_kind.get("gpu_user_annotation", ())]
        launchers = {_id(event): event["name"] for event in by_kind.get("cpu_op", ()) if _id(event) is not None}
        spans = device_spans([times(kernel, launchers.get(_id(kernel))) for kernel in kernels], ranges)
    else:
        ours = [e for e in by_kind["user_annotation"] + by_kind.get("cpu_op", []) if e["tid"] == whole["tid"]]
        ranges = [times(event) for event in by_kind["user_annotation"]]
        spans = host_spans([times(event) for event in ours])
    return _timeline(whole["dur"] * 1e-6, spans, ranges)


def host_spans(events: Iterable[Event]) -> list[Span]:
    """Spans of one thread's events, each of which lies within or beside every other.

    All the time of an "op:" range, and of an operator of var_fast, is that operator's. Elsewhere a moment is of the
    innermost call's class, or of the class of the call around it where it has none.
    """
    spans: list[Span] = []
    stack: list[tuple[float, str | None, bool]] = []  # end, operator (None: idle), whether it owns what is within
    now = 0.0

    def advance(to: float) -> None:
        nonlocal now
        if stack and stack[-1][1] is not None and to > now:
            spans.append(Span(now, to, stack[-1][1]))
        now = max(now, to)

    def close(until: float) -> None:
        while stack and stack[-1][0] <= until:
            advance(stack[-1][0])
            stack.pop()

    for event in sorted(events, key=lambda event: (event.begin, -event.end)):
        close(event.begin)
        advance(event.begin)
        end, operator, owned = event.end, None, False
        if stack:
            end = min(end, stack[-1][0])  # the trace is rounded
            _, operator, owned = stack[-1]
        if not owned:
            operator, owned = _operator_of_call(event.name, operator)
        stack.append((end, operator, owned))
    close(float("inf"))
    return spans


def device_spans(kernels: Iterable[Event], ranges: Iterable[Event]) -> list[Span]:
    """Spans of a device's kernels and copies, without what overlaps with an earlier one. A kernel is of the outermost
    of the "op:" `ranges` on the device in which its middle lies, else of its launcher's class, else of its name's."""
    owners: list[Event] = []
    for event in sorted(ranges, key=lambda event: (event.begin, -event.end)):
        if event.name.startswith(OPERATOR) and not (owners and event.begin < owners[-1].end):
            owners.append(event)
    begins = [owner.begin for owner in owners]
    spans: list[Span] = []
    now = 0.0
    for kernel in sorted(kernels):
        middle = (kernel.begin + kernel.end) / 2
        place = bisect_right(begins, middle) - 1
        if place >= 0 and middle <= owners[place].end:
            operator = owners[place].name.removeprefix(OPERATOR)
        elif kernel.launcher is not None:
            operator = _operator_of_call(kernel.launcher, None)[0] or OTHER
        else:
            operator = _operator_of_kernel(kernel.name)
        if kernel.end > now:
            spans.append(Span(max(kernel.begin, now), kernel.end, operator))
            now = kernel.end
    return spans


def picture(spans: list[Span], total: float, most: int = MOST_SPANS) -> list[Span]:
    """The spans as far as they can be told apart when drawn, at most `most` of them."""
    step = total / FINENESS
    drawn = _merged(spans, step)
    while len(drawn) > most:
        step *= 2
        drawn = _merged(spans, step)
    return drawn


def _merged(spans: list[Span], step: float) -> list[Span]:
    """Spans of one operator become one where no gap between them exceeds `step`; those of several, where they are no
    longer than `step` together: then they count as the longer one's. So at most two are left for every step."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and span.begin - last.end <= step and span.operator == last.operator:
            merged[-1] = last._replace(end=span.end)
        elif last is not None and span.end - last.begin <= step:
            longer = max(last, span, key=lambda one: one.end - one.begin)
            merged[-1] = Span(last.begin, span.end, longer.operator)
        else:
            merged.append(span)
    return merged


def _timeline(total: float, spans: list[Span], ranges: list[Event]) -> dict[str, Any]:
    totals: dict[str, float] = {}
    for span in spans:
        totals[span.operator] = totals.get(span.operator, 0.0) + span.end - span.begin
    totals[IDLE] = max(0.0, total - sum(totals.values()))
    scales = []
    for event in sorted(ranges):
        if event.name.startswith(SCALE):
            si, pn = event.name.removeprefix(SCALE).split(":")
            scales.append({"scale": int(si), "patch_num": int(pn), "begin_s": round(event.begin, DIGITS)})
    decoders = [event for event in ranges if event.name == DECODER]
    return {
        "total_s": total,
        "spans": [_shown(span) | {"operator": span.operator} for span in picture(spans, total)],
        "totals_s": dict(sorted(totals.items(), key=lambda item: -item[1])),
        "scales": scales,
        "decoder": _shown(max(decoders)) if decoders else None,
    }


def _shown(event: Span | Event) -> dict[str, Any]:
    return {"begin_s": round(event.begin, DIGITS), "seconds": round(event.end - event.begin, DIGITS)}


def _operator_of_call(name: str, around: str | None) -> tuple[str | None, bool]:
    """(operator of a call or a range, whether it owns what it calls); `around`: the operator of the call around it."""
    if name.startswith(OPERATOR):
        return name.removeprefix(OPERATOR), True
    if name == WHOLE or name == DECODER or name.startswith(SCALE):
        return around, False
    space, _, short = name.partition("::")
    if space == "var_fast":
        return short, True
    if short in PRODUCT_CALLS:
        return PRODUCTS, False
    if short in CASTS:  # also those that autocast puts inside a product
        return OTHER, False
    return next((operator for part, operator in CALLS if part in short), around or OTHER), False


def _operator_of_kernel(name: str) -> str:
    # longest first: residual_adaln_modulate contains adaln_modulate
    ours = ((operator, operator) for operator in sorted(FAST_BACKENDS, key=len, reverse=True))
    lowered = name.lower()
    return next((operator for part, operator in (*ours, *KERNELS) if part in lowered), OTHER)


def _id(event: dict[str, Any]) -> Any:
    return (event.get("args") or {}).get("External id")
