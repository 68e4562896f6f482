"""The machine and the software of a report: what somebody else needs to judge its numbers."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench import nvml
from var_fast import doctor

ROOT = Path(__file__).resolve().parents[1]
CPUS = Path("/sys/devices/system/cpu")
UNKNOWN_CACHE_BYTES = 64 * 2**20  # more than most have, so that what is rotated beyond it is beyond the real one
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def environment(device: torch.device | str) -> dict[str, Any]:
    """Plain values for JSON, without names of hosts, users or directories. `gpu` is None for a CPU; `commit` and
    `dirty` are None where this is not a git checkout or git is missing; `triton` where it is not installed."""
    device = torch.device(device)
    cpu = doctor.report()["cpu"]
    commit, dirty = _git()
    return {
        "cpu": {
            "model": cpu["model"],
            "cores": cpu["cores"],
            "threads": cpu["threads"],
            "features": [name for name, present in cpu["features"].items() if present],
        },
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
    }


def last_level_cache_bytes(device: torch.device | str) -> int:
    """Bytes of all caches of the last level together: L2 of a GPU; of a CPU 64 MiB where Linux does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes: dict[tuple[int, str], int] = {}  # processors that share a cache all list it
    for cache in CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, shared_by, size = (
                (cache / name).read_text().strip() for name in ("level", "shared_cpu_list", "size")
            )
            sizes[int(level), shared_by] = int(size[:-1]) * UNITS[size[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or UNKNOWN_CACHE_BYTES


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": nvml.driver(),
        "capability": f"{properties.major}.{properties.minor}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> tuple[str | None, bool | None]:
    """The commit of the repository whose root is ROOT, and whether files differ from it, results aside."""
    found = _run_git("rev-parse", "--show-toplevel", "HEAD")
    if found is None:
        return None, None
    top, commit = found.splitlines()
    if Path(top).resolve() != ROOT:  # unpacked inside somebody else's repository
        return None, None
    changes = _run_git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return commit, None if changes is None else bool(changes.strip())


def _run_git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout
