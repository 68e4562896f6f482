import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import nvml
from tests.bench.fake_nvml import FakeGPU, install


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's device 0 as the GPU with UUID b, on bus 7."""
    properties = SimpleNamespace(uuid="b", pci_domain_id=0, pci_bus_id=7, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return properties


def process(pid, memory):
    return SimpleNamespace(pid=pid, usedGpuMemory=memory)


def test_without_the_package_or_the_driver_the_reason_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.snapshot(0) == {"problem": "no pynvml: pip install nvidia-ml-py"}
    assert nvml.driver() is None
    install(monkeypatch, [], starts=False)
    assert nvml.snapshot(0) == {"problem": "NVML does not start: Driver Not Loaded"}
    assert nvml.driver() is None


def test_a_gpu_that_is_not_there_is_a_problem_too(monkeypatch):
    fake = install(monkeypatch, [FakeGPU("a")])
    assert nvml.snapshot(3) == {"problem": "NVML: Invalid Argument"}
    assert fake.users == 0


def test_snapshot(monkeypatch):
    gpu = FakeGPU("a", reasons=0x1 | 0x4 | 0x20, violation_ns={0: 2_500_000_000})
    gpu.processes = [process(os.getpid(), 10), process(os.getpid() + 1, 5), process(os.getpid() + 2, None)]
    fake = install(monkeypatch, [gpu])
    assert nvml.snapshot(0) == {
        "name": "Fake GPU",
        "sm_clock_mhz": 1200,
        "sm_clock_max_mhz": 1980,
        "memory_clock_mhz": 2600,
        "memory_clock_max_mhz": 2619,
        "power_w": 350.5,
        "power_limit_w": 700.0,
        "temperature_c": 55,
        "utilisation_percent": 97,
        "other_processes": {"count": 2, "memory_bytes": 5},
        "throttle_reasons": ["power cap", "thermal slowdown"],  # idle is none
        "violations": {"power cap": 2.5},
    }
    assert nvml.driver() == "580.1"
    assert fake.users == 0


def test_the_newer_name_of_the_reasons_is_asked_first(monkeypatch):
    fake = install(monkeypatch, [FakeGPU("a", reasons=0)])
    fake.nvmlDeviceGetCurrentClocksEventReasons = lambda gpu: 0x80
    assert nvml.snapshot(0)["throttle_reasons"] == ["power brake"]


def test_what_a_gpu_does_not_tell_is_none(monkeypatch):
    install(monkeypatch, [FakeGPU("a", unsupported=("power",))])
    found = nvml.snapshot(0)
    assert found["power_w"] is None
    assert found["power_limit_w"] == 700
    assert found["violations"] == {}


def test_in_a_container_our_own_process_has_another_number(monkeypatch):
    strangers = [process(os.getpid() + 1, 900), process(os.getpid() + 2, 310)]
    install(monkeypatch, [FakeGPU("a", processes=strangers)])
    assert nvml.snapshot(0)["other_processes"] == {"count": 2, "memory_bytes": 1210}  # we do not use CUDA
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 300)
    assert nvml.snapshot(0)["other_processes"] == {"count": 1, "memory_bytes": 900}


def test_cuda_devices_are_found_by_uuid_and_else_by_address(monkeypatch, cuda):
    install(monkeypatch, [FakeGPU("a", bus=7), FakeGPU("b", bus=9)])
    assert nvml.index_of("cuda:0") == 1
    cuda.uuid = "a part of a GPU"
    assert nvml.index_of("cuda:0") == 0
    cuda.pci_bus_id = 8
    with pytest.raises(nvml.NoNVML, match="none of NVML's 2 GPUs is cuda:0"):
        nvml.index_of("cuda:0")


def test_watch_flags_what_happened_in_between(monkeypatch, cuda):
    gpu = FakeGPU("b", violation_ns={0: 100, 1: 50})
    install(monkeypatch, [gpu])
    with nvml.Watch("cuda:0") as watch:
        assert watch.to_json() == {"before": watch.before, "after": None, "throttled": []}
        gpu.violation_ns[0] = 101
        gpu.reasons = 0x40
    found = watch.to_json()
    assert found["throttled"] == ["hardware thermal slowdown", "power cap"]
    assert found["before"]["throttle_reasons"] == []
    assert found["after"]["throttle_reasons"] == ["hardware thermal slowdown"]


def test_a_calm_run_is_not_flagged_nor_a_cpu(monkeypatch, cuda):
    install(monkeypatch, [FakeGPU("b", violation_ns={0: 100}, reasons=0x1)])
    with nvml.Watch("cuda:0") as watch:
        pass
    assert watch.throttled == []
    with nvml.Watch("cpu") as watch:
        pass
    assert watch.to_json() == {"problem": "cpu is no NVIDIA device"}


def test_the_state_after_an_interrupted_run_is_kept(monkeypatch, cuda):
    install(monkeypatch, [FakeGPU("b", reasons=0x4)])
    watch = nvml.Watch("cuda:0")
    with pytest.raises(KeyboardInterrupt), watch:
        raise KeyboardInterrupt
    assert watch.throttled == ["power cap"]


def test_energy(monkeypatch, cuda):
    gpu = FakeGPU("b", energy_mj=1500)
    install(monkeypatch, [gpu])
    assert nvml.energy_j("cuda:0") == 1.5
    assert nvml.energy_j("cpu") is None
    gpu.energy_mj = None
    assert nvml.energy_j("cuda:0") is None
    calls = []
    assert nvml.joules(lambda: calls.append(1), "cuda:0") is None
    assert nvml.joules(lambda: calls.append(1), "cpu") is None
    assert calls == []  # no time is spent where nothing can be read


def test_joules_of_a_call_from_a_counter_that_moves_in_steps(monkeypatch, cuda):
    gpu = FakeGPU("b")
    fake = install(monkeypatch, [gpu])
    used_mj = 0

    def call():  # 2 J, of which the counter shows whole tens
        nonlocal used_mj
        used_mj += 2000
        gpu.energy_mj = used_mj // 10_000 * 10_000
        time.sleep(0.001)

    # Read at any moment instead of at its moves, the counter would be off by up to 10 J of some 40.
    assert nvml.joules(call, "cuda:0", seconds=0.05) == pytest.approx(2.0, rel=0.25)
    assert used_mj >= 2000 * 20
    assert fake.users == 0


def test_joules_ends_where_the_counter_stands_still(monkeypatch, cuda):
    install(monkeypatch, [FakeGPU("b", energy_mj=7)])
    monkeypatch.setattr(nvml, "LONGEST_TICK_S", 0.02)
    assert nvml.joules(lambda: None, "cuda:0", seconds=0.02) == 0
