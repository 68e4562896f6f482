"""The rates of this device that floors are made of: memory copy and matrix products, each the best that was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.machine import last_level_cache_bytes
from bench.timing import elapsed

LEAST_COPY_BYTES, MOST_COPY_BYTES = 128 * 2**20, 2**30
COPIES = 10
REPETITIONS = 6
SECONDS_A_DTYPE = 0.9
"""Larger products come last and are left out where they would take longer: a CPU without bfloat16 takes seconds."""

PRODUCTS = {  # rows, inputs, outputs
    "cpu": ((256, 1024, 1024), (1024, 1024, 1024), (256, 1024, 4096), (2048, 2048, 2048), (4096, 4096, 4096)),
    "cuda": ((4096, 4096, 4096), (8192, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096)),
}
CONVOLUTIONS = {  # images, channels, side
    "cpu": ((1, 64, 32), (1, 160, 64)),
    "cuda": ((8, 160, 256), (8, 512, 128)),
}


class Candidate(NamedTuple):
    name: str
    flops: float
    call: Callable[[], Any]


def measure(device: torch.device | str, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    """{"copy_bytes_per_s": x, "flops_per_s": {dtype name: x}, "of": {"copy" or dtype name: what reached it}}.

    Floors are ceilings of what is possible, so each rate is the best repetition of the best shape, not a median. A
    copy counts the bytes read and those written. Products are F.linear, also with weights packed by oneDNN, and 3x3
    convolutions, which on some CPUs run faster. A CPU without products of a half type can take its numbers as float32,
    so that no half type has a lower rate there. A dtype that this device has no product of is left out.
    """
    device = torch.device(device)
    copied, copy_rate = _copy(device)
    rates: dict[str, Any] = {"copy_bytes_per_s": copy_rate, "flops_per_s": {}, "of": {"copy": copied}}
    asked = {dtype: fastest(_candidates(device, dtype), device) for dtype in dtypes}
    if device.type == "cpu":
        float32 = torch.float32
        in_float32 = asked[float32] if float32 in asked else fastest(_candidates(device, float32), device)
        asked = {dtype: faster(best, in_float32) for dtype, best in asked.items()}
    for dtype, best in asked.items():
        if best is not None:
            name = str(dtype).removeprefix("torch.")
            rates["of"][name], rates["flops_per_s"][name] = best
    return rates


def faster(best: tuple[str, float] | None, in_float32: tuple[str, float] | None) -> tuple[str, float] | None:
    """The rate of a type, or that of its numbers as float32."""
    if in_float32 is None or (best is not None and best[1] >= in_float32[1]):
        return best
    return f"{in_float32[0]}, in float32", in_float32[1]


@torch.no_grad()
def fastest(
    candidates: Iterator[Candidate],
    device: torch.device,
    seconds: float = SECONDS_A_DTYPE,
    clock: Callable[[Callable[[], Any], torch.device], float] = elapsed,
) -> tuple[str, float] | None:
    """(name, operations a second) of the candidate with the best repetition. Ends after about `seconds` of the calls
    that count: the first of each candidate does not, for libraries load in it; then come up to REPETITIONS."""
    best, spent = None, 0.0
    for candidate in candidates:
        if best is not None and spent + candidate.flops / best[1] > seconds:
            continue
        try:
            clock(candidate.call, device)
        except RuntimeError:  # not on this device, or not in this dtype
            continue
        times = []
        while not times or (len(times) < REPETITIONS and spent + times[-1] < seconds):
            times.append(clock(candidate.call, device))
            spent += times[-1]
        rate = candidate.flops / min(times)
        if best is None or rate > best[1]:
            best = candidate.name, rate
    return best


def _copy(device: torch.device) -> tuple[str, float]:
    least = MOST_COPY_BYTES if device.type == "cuda" else LEAST_COPY_BYTES
    size = min(max(least, 4 * last_level_cache_bytes(device)), MOST_COPY_BYTES)
    block = torch.randn(2**20, device=device)  # 4 MiB: random, without the time that 1 GiB of it takes
    source = block.repeat(-(-size // block.nbytes))
    target = torch.empty_like(source)
    times = [elapsed(lambda: target.copy_(source), device) for _ in range(1 + COPIES)]
    return f"{source.nbytes / 2**20:.0f} MiB", 2 * source.nbytes / min(times[1:])


def _candidates(device: torch.device, dtype: torch.dtype) -> Iterator[Candidate]:
    """From small to large within each kind; each made only when it is asked for."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    for images, channels, side in CONVOLUTIONS[device.type]:
        x_BChw = random(images, channels, side, side).to(memory_format=torch.channels_last)
        weight = random(channels, channels, 3, 3).to(memory_format=torch.channels_last)
        yield Candidate(
            f"3x3 convolution, {images} x {channels} channels x {side} x {side}",
            2.0 * images * side**2 * channels**2 * 9,
            partial(F.conv2d, x_BChw, weight, padding=1),
        )
    for rows, inputs, outputs in PRODUCTS[device.type]:
        x_NC, weight_OC = random(rows, inputs), random(outputs, inputs)
        shape, flops = f"{rows} x {inputs} -> {outputs}", 2.0 * rows * inputs * outputs
        yield Candidate(f"linear, {shape}", flops, partial(F.linear, x_NC, weight_OC))
        if device.type == "cpu" and dtype != torch.float32:
            yield Candidate(f"packed linear, {shape}", flops, _packed(x_NC, weight_OC))


def _packed(x_NC: torch.Tensor, weight_OC: torch.Tensor) -> Callable[[], Any]:
    """The product with weights that oneDNN has put in its own order; raises where this CPU has no such kernel."""
    packed: list[torch.Tensor] = []

    def call() -> Any:
        if not packed:  # in the first call, which is not timed
            packed.append(torch.ops.mkldnn._reorder_linear_weight(weight_OC, x_NC.shape[0]))
        return torch.ops.mkldnn._linear_pointwise(x_NC, packed[0], None, "none", [], "")

    return call
