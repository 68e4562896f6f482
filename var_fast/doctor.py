"""What var_fast finds on this machine, and what each operator would therefore use."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import var_fast
from var_fast.errors import UserError
from var_fast.ops.backend import FAST_BACKENDS, LOOPS, cuda_problem, explain, native_problem

if TYPE_CHECKING:  # `report` must run on a machine that has no rich
    from rich.console import Console

DEMO_FILES = ("config.json", "tokenizer.safetensors", "transformer.safetensors")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # as /proc/cpuinfo names them


def report() -> dict:
    """Everything `print_report` shows, as plain values (strings, numbers, lists, dicts) that JSON can hold."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "cuda": _cuda(),
        "extension": _extension(),
        "operators": {
            op: {device: _backend(op, device) for device in ("cpu", "cuda")} for op in (*LOOPS, *FAST_BACKENDS)
        },
        "demo": _demo(Path(var_fast.__file__).parent / "demo"),
    }


def print_report(console: Console) -> None:
    """Print `report()` as two tables: the machine, and the backend of every operator."""
    from rich.markup import escape
    from rich.table import Table

    found = report()
    machine = Table("what", "found", title="this machine")
    for name, value in found["versions"].items():
        machine.add_row(name, value)
    cpu = found["cpu"]
    features = ", ".join(name if present else f"no {name}" for name, present in cpu["features"].items())
    machine.add_row("CPU", f"{cpu['model']}; {features}")
    machine.add_row("threads", f"{cpu['threads']} of {cpu['cores']} cores")
    cuda = found["cuda"]
    machine.add_row("CUDA devices", ", ".join(cuda["devices"]) or "none")
    machine.add_row("nvcc", f"{cuda['nvcc'] or 'not found'}: {cuda['builds']}")
    extension = found["extension"]
    machine.add_row(
        "var_fast._C",
        escape(extension["problem"] or f"built: {extension['file']}, {extension['instructions']} instructions"),
    )
    demo = found["demo"]
    machine.add_row(
        "demo model", "\n".join([demo["directory"], *(f"  {f}: {escape(s)}" for f, s in demo["files"].items())])
    )
    console.print(machine)

    operators = Table("operator", "on the CPU", "on CUDA", title="backends")
    for op, devices in found["operators"].items():
        operators.add_row(op, *(escape(f"{answer['backend']} ({answer['reason']})") for answer in devices.values()))
    console.print(operators)


def _versions() -> dict[str, str]:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed (no operator of this version uses it)"
    return {
        "var_fast": var_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }


def _cpu() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    entries = dict(line.split(":", 1) for line in lines if ":" in line)
    entries = {key.strip(): value.strip() for key, value in entries.items()}
    flags = entries.get("flags", "").split()
    return {
        "model": entries.get("model name", platform.machine()),
        "features": {name: name in flags for name in CPU_FEATURES},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cuda() -> dict:
    nvcc = shutil.which("nvcc") or shutil.which(
        os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    )
    return {
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch_cuda": torch.version.cuda,
        "nvcc": nvcc,
        "builds": _cuda_builds(nvcc),
    }


def _cuda_builds(nvcc: str | None) -> str:
    if native_problem() is None and cuda_problem() is None:
        return "the extension holds the CUDA operators"
    if nvcc is None:
        return "var_fast builds for the CPU only"
    if native_problem() or torch.version.cuda:
        return "pip install -e . builds for CUDA too" if torch.version.cuda else "var_fast is not built"
    return "built for the CPU only, as torch is (VAR_FAST_CUDA=1 builds for CUDA too)"


def _extension() -> dict:
    problem = native_problem()
    if problem:
        return {"built": False, "file": None, "problem": problem, "instructions": None}
    from var_fast import _C

    return {"built": True, "file": _C.__file__, "problem": None, "instructions": _C.cpu_isa()}


def _backend(op: str, device: str) -> dict[str, str]:
    try:
        backend, reason = explain(op, device)
    except UserError as error:  # VAR_FAST_BACKEND names one that cannot run
        backend, reason = "none", str(error)
    return {"backend": backend, "reason": reason}


def _demo(directory: Path) -> dict:
    files = {name: _file_state(directory / name) for name in DEMO_FILES}
    return {
        "directory": str(directory),
        "files": files,
        "complete": not any(state.startswith(("missing", "damaged", "not checked")) for state in files.values()),
    }


def _file_state(path: Path) -> str:
    if not path.is_file():
        return "missing"
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            return "not checked: safetensors is not installed"
        try:  # opening compares the header with the file's length
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"damaged: {error}"
    return f"complete, {path.stat().st_size / 1e6:.1f} MB"
