"""The most memory that a call holds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")


def peak_bytes(call: Callable[[], Any], device: torch.device | str) -> tuple[Any, int | None]:
    """(what `call` returns, bytes held at most during the call beyond those held before it).

    On CUDA as the allocator counts tensors; on a CPU the resident memory of the whole process, which holds also what
    malloc keeps of blocks that are free again, exact to some 0.1 MB a thread; None where Linux does not tell it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    before = _restart_peak()
    result = call()
    if before is None:
        return result, None
    return result, max(0, _status("VmHWM") - before)


def _return_free_memory() -> None:
    # What malloc keeps of earlier calls would count as held before, and its reuse as nothing.
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library than glibc
        pass


def _restart_peak() -> int | None:
    """Starts the kernel's peak anew (proc(5), clear_refs); bytes resident now, None where that cannot be done."""
    try:
        (PROCESS / "clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, StopIteration):
        return None


def _status(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
