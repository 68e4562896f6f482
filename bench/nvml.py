"""What the driver says of a GPU: clocks, power, temperature, other users, throttling, energy (NVML, nvidia-ml-py)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

# nvml.h: bits of the reasons for the present clocks, the deliberate ones (idle, application clocks, display) aside
THROTTLE_REASONS = {
    "power cap": 0x4,
    "hardware slowdown": 0x8,
    "sync boost": 0x10,
    "thermal slowdown": 0x20,
    "hardware thermal slowdown": 0x40,
    "power brake": 0x80,
}
# nvml.h: nvmlPerfPolicyType_t, of which the driver counts the time
VIOLATIONS = {"power cap": 0, "thermal slowdown": 1, "sync boost": 2, "board limit": 3, "reliability": 5}
LEAST_ROUND_S, LONGEST_TICK_S = 5e-3, 0.5
CLOCK_SM, CLOCK_MEMORY, TEMPERATURE_GPU = 1, 2, 0


class NoNVML(Exception):
    """Why NVML does not answer, in one line."""


@contextmanager
def _nvml() -> Iterator[Any]:
    """The module pynvml, initialised."""
    try:
        import pynvml
    except ImportError as error:
        raise NoNVML("no pynvml: pip install nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoNVML(f"NVML does not start: {error}") from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise NoNVML(f"NVML: {error}") from error
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def driver() -> str | None:
    """The driver's version, None where NVML does not answer."""
    try:
        with _nvml() as pynvml:
            return _text(pynvml.nvmlSystemGetDriverVersion())
    except NoNVML:
        return None


def snapshot(index: int) -> dict[str, Any]:
    """The state of the GPU with NVML's number `index`; a value is None where this GPU does not tell it.

    Clocks in MHz, power in W, temperature in degrees C, utilisation in percent, memory in bytes, `violations`: seconds
    of throttling since the driver was loaded. {"problem": why} where NVML does not answer.
    """
    try:
        with _nvml() as pynvml:
            return _snapshot(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index))
    except NoNVML as problem:
        return {"problem": str(problem)}


def index_of(device: torch.device | str) -> int:
    """NVML's number of a CUDA device. CUDA_VISIBLE_DEVICES renumbers CUDA's devices, but not NVML's, so that they are
    matched by UUID, or by PCI address where the UUID is that of a part of a GPU. Raises NoNVML."""
    device = torch.device(device)
    if device.type != "cuda":
        raise NoNVML(f"{device.type} is no NVIDIA device")
    properties = torch.cuda.get_device_properties(device)
    uuid = str(getattr(properties, "uuid", "")).removeprefix("GPU-")
    pci = tuple(getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
    with _nvml() as pynvml:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        for index, handle in enumerate(handles):
            if uuid and _text(pynvml.nvmlDeviceGetUUID(handle)).removeprefix("GPU-") == uuid:
                return index
        for index, handle in enumerate(handles):
            address = pynvml.nvmlDeviceGetPciInfo(handle)
            if (address.domain, address.bus, address.device) == pci:
                return index
    raise NoNVML(f"none of NVML's {len(handles)} GPUs is {device} (UUID {uuid or 'unknown'})")


class Watch:
    """`with Watch(device) as watch: ...`: the GPU's state before and after, and whether it was throttled in between."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.before: dict[str, Any] | None = None
        self.after: dict[str, Any] | None = None

    def __enter__(self) -> Watch:
        self.before = self._look()
        return self

    def __exit__(self, *exception: object) -> None:
        self.after = self._look()

    def _look(self) -> dict[str, Any]:
        try:
            return snapshot(index_of(self.device))
        except NoNVML as problem:
            return {"problem": str(problem)}

    @property
    def throttled(self) -> list[str]:
        """Reasons, sorted: those in force at the end, and those whose time has grown meanwhile."""
        before, after = self.before or {}, self.after or {}
        then, now = before.get("violations") or {}, after.get("violations") or {}
        grown = {name for name in then.keys() & now.keys() if now[name] > then[name]}
        return sorted(grown | set(after.get("throttle_reasons") or ()))

    def to_json(self) -> dict[str, Any]:
        """`throttled`: why the GPU ran slower than it could; or only the `problem`, why nothing is known."""
        if "problem" in self.before:
            return {"problem": self.before["problem"]}
        return {"before": self.before, "after": self.after, "throttled": self.throttled}


def energy_j(device: torch.device | str) -> float | None:
    """Joules that the GPU has used since its driver was loaded, None where it does not count them."""
    try:
        index = index_of(device)
        with _nvml() as pynvml:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(index)) / 1000
    except NoNVML:
        return None


def joules(call: Callable[[], Any], device: torch.device | str, seconds: float = 1.0) -> float | None:
    """Joules a call, of the whole GPU, its idle power included; None where the GPU does not count them.

    The counter moves some ten or fifty times a second only: calls are repeated from one of its moves to the first one
    after `seconds`.
    """
    try:
        index = index_of(device)
        with _nvml() as pynvml:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)

            def counter_j() -> float:
                return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000

            counter_j()  # raises before any work is done
            run = _repeated(call, torch.device(device))
            run(1)
            begin = time.monotonic()
            run(1)
            round_calls = math.ceil(LEAST_ROUND_S / max(time.monotonic() - begin, 1e-6))
            _, begin_j = _until_it_moves(run, round_calls, counter_j, 0.0)
            calls, end_j = _until_it_moves(run, round_calls, counter_j, seconds)
            return (end_j - begin_j) / calls
    except NoNVML:
        return None


def _repeated(call: Callable[[], Any], device: torch.device) -> Callable[[int], None]:
    def run(calls: int) -> None:
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)

    return run


def _until_it_moves(
    run: Callable[[int], None], round_calls: int, counter: Callable[[], float], seconds: float
) -> tuple[int, float]:
    """(calls, the counter) when it has moved for the first time after `seconds`, or not in LONGEST_TICK_S after."""
    begin, calls, last = time.monotonic(), 0, counter()
    while True:
        run(round_calls)
        calls += round_calls
        now, passed = counter(), time.monotonic() - begin
        if passed >= seconds and (now != last or passed > seconds + LONGEST_TICK_S):
            return calls, now
        last = now


def _snapshot(pynvml: Any, handle: Any) -> dict[str, Any]:
    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(pynvml, function)(handle, *arguments)
        except (pynvml.NVMLError, AttributeError):  # not of this GPU, or not of this version of pynvml
            return None

    def watts(milliwatts: int | None) -> float | None:
        return None if milliwatts is None else milliwatts / 1000

    utilisation = ask("nvmlDeviceGetUtilizationRates")
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:  # its name until 2023
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    violations = {name: ask("nvmlDeviceGetViolationStatus", policy) for name, policy in VIOLATIONS.items()}
    return {
        "name": _text(ask("nvmlDeviceGetName")),
        "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", CLOCK_SM),
        "sm_clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", CLOCK_SM),
        "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", CLOCK_MEMORY),
        "memory_clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", CLOCK_MEMORY),
        "power_w": watts(ask("nvmlDeviceGetPowerUsage")),
        "power_limit_w": watts(ask("nvmlDeviceGetEnforcedPowerLimit")),
        "temperature_c": ask("nvmlDeviceGetTemperature", TEMPERATURE_GPU),
        "utilisation_percent": None if utilisation is None else utilisation.gpu,
        "other_processes": _others(ask("nvmlDeviceGetComputeRunningProcesses")),
        "throttle_reasons": None
        if reasons is None
        else [name for name, bit in THROTTLE_REASONS.items() if reasons & bit],
        "violations": {name: status.violationTime * 1e-9 for name, status in violations.items() if status is not None},
    }


def _others(processes: list[Any] | None) -> dict[str, int] | None:
    """How many processes but this one compute on the GPU, and how much memory they hold there."""
    if processes is None:
        return None
    others = [(p.pid, p.usedGpuMemory or 0) for p in processes]
    ours = [p for p in others if p[0] == os.getpid()]
    if not ours and others and torch.cuda.is_initialized():
        # In a container NVML may number processes as the host does; the one that holds about our memory is us.
        held = torch.cuda.memory_reserved()
        ours = [min(others, key=lambda p: abs(p[1] - held))]
    others = [p for p in others if p not in ours]
    return {"count": len(others), "memory_bytes": sum(memory for _, memory in others)}


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
