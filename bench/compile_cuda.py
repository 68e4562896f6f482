"""Compiles csrc/cuda for every GPU generation with nvcc, without a GPU, and reads what each kernel uses."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_SHORTER = {
    "(anonymous namespace)::": "",
    "var_fast::cuda::": "",
    "__nv_bfloat16": "bf16",
    "__half": "f16",
    "float": "f32",
}
_USED = re.compile(r"Used (\d+) registers.*?(?:, (\d+) bytes smem)?$")


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def sources(only: str = "") -> list[Path]:
    """The files whose name, as cuda/<operator>, holds `only`."""
    return [path for path in sorted(SOURCES.glob("*.cu")) if only in f"cuda/{path.stem}"]


def compile_file(nvcc: str, source: Path, target: int, cuobjdump: str | None = None) -> list[dict]:
    """What each kernel of the file uses: fields of compile_report.Compiled. Tensor-core instructions are counted where
    `cuobjdump` is given. Raises RuntimeError with what nvcc says where it refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [nvcc, "-O3", "-std=c++17", "-cubin", f"-arch={ARCHITECTURES[target]}", "-Xptxas", "-v"]
        done = subprocess.run([*command, source, "-o", cubin], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source}: {done.stderr or done.stdout}")
        kernels = parse(done.stdout + done.stderr)
        code = _code(cuobjdump, cubin)
    names = _readable([kernel["name"] for kernel in kernels])
    for kernel, name in zip(kernels, names, strict=True):
        mangled, kernel["name"] = kernel["name"], f"cuda/{source.stem}: {name}"
        kernel["target"] = ARCHITECTURES[target]
        kernel["tensor_core_instructions"] = len(re.findall(r"\b[HI]MMA\b", code.get(mangled, "")))
        kernel["matrix"] = name.split("<")[0].endswith("_mma")
        if kernel["matrix"] and code and not kernel["tensor_core_instructions"]:
            kernel["problem"] = kernel["problem"] or "no tensor-core instruction"
    return kernels


def parse(ptxas: str) -> list[dict]:
    """Registers, stack and shared memory of each kernel in what `ptxas -v` prints, under its mangled name."""
    kernels: list[dict] = []
    for line in ptxas.splitlines():
        if found := _ENTRY.search(line):
            kernels.append({"name": found[1], "problem": None})
        elif (found := _FRAME.search(line)) and kernels and "stack" not in kernels[-1]:
            stack, stores, loads = map(int, found.groups())
            kernels[-1]["stack"] = stack
            kernels[-1]["problem"] = "spills" if stack or stores or loads else None
        elif (found := _USED.search(line)) and kernels:
            kernels[-1] |= {"registers": int(found[1]), "shared": int(found[2] or 0)}
    return kernels


def _code(cuobjdump: str | None, cubin: Path) -> dict[str, str]:
    """The disassembly of each kernel by its mangled name; empty without a tool."""
    if cuobjdump is None:
        return {}
    dump = subprocess.run([cuobjdump, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", dump)
    return dict(zip(parts[1::2], parts[2::2]))


def _readable(mangled: list[str]) -> list[str]:
    """kernel<arguments> of mangled names, or these themselves where c++filt is missing."""
    tool = shutil.which("c++filt")
    if tool is None or not mangled:
        return mangled
    done = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = []
    for line in done.stdout.splitlines():
        for long, short in _SHORTER.items():
            line = line.replace(long, short)
        names.append(re.sub(r"\((?:bool|int)\)", "", line).removeprefix("void ").split("(")[0])
    return names
