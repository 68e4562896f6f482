"""A pynvml without a GPU: install(monkeypatch, gpus) puts it where `import pynvml` finds it."""

from __future__ import annotations

import types
from dataclasses import dataclass, field


class NVMLError(Exception):
    pass


@dataclass
class FakeGPU:
    uuid: str
    bus: int = 0
    reasons: int = 0
    processes: list = field(default_factory=list)
    violation_ns: dict[int, int] = field(default_factory=dict)
    energy_mj: int | None = 0
    unsupported: tuple[str, ...] = ()


class Fake(types.ModuleType):
    NVMLError = NVMLError

    def __init__(self, gpus: list[FakeGPU], starts: bool = True):
        super().__init__("pynvml")
        self.gpus, self.starts, self.users = gpus, starts, 0

    def nvmlInit(self):
        if not self.starts:
            raise NVMLError("Driver Not Loaded")
        self.users += 1

    def nvmlShutdown(self):
        self.users -= 1

    def nvmlSystemGetDriverVersion(self):
        return b"580.1"

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        if self.users <= 0:
            raise NVMLError("Uninitialized")
        if index >= len(self.gpus):
            raise NVMLError("Invalid Argument")
        return self.gpus[index]

    def nvmlDeviceGetName(self, gpu):
        return "Fake GPU"

    def nvmlDeviceGetUUID(self, gpu):
        return f"GPU-{gpu.uuid}"

    def nvmlDeviceGetPciInfo(self, gpu):
        return types.SimpleNamespace(domain=0, bus=gpu.bus, device=0)

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return {1: 1200, 2: 2600}[kind]

    def nvmlDeviceGetMaxClockInfo(self, gpu, kind):
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetPowerUsage(self, gpu):
        if "power" in gpu.unsupported:
            raise NVMLError("Not Supported")
        return 350500

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return 700000

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return 55

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return types.SimpleNamespace(gpu=97, memory=12)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return gpu.processes

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu):
        return gpu.reasons

    def nvmlDeviceGetViolationStatus(self, gpu, policy):
        if policy not in gpu.violation_ns:
            raise NVMLError("Not Supported")
        return types.SimpleNamespace(violationTime=gpu.violation_ns[policy], referenceTime=0)

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        if gpu.energy_mj is None:
            raise NVMLError("Not Supported")
        return gpu.energy_mj


def install(monkeypatch, gpus: list[FakeGPU], starts: bool = True) -> Fake:
    fake = Fake(gpus, starts)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    return fake
