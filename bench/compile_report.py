"""Compiles every Triton and CUDA kernel without a GPU and reads what it uses: python bench/compile_report.py.

Every configuration that kernels/<operator>.py lists in `configurations()` is compiled for sm_80, sm_90 and sm_100, or
for those of them that it names; so is, where nvcc is found, every kernel of csrc/cuda (sm_90a in place of sm_90). The
table shows registers a thread, stack (spills), shared memory (of CUDA kernels: what is known before the launch) and
tensor-core instructions. Exit code 1 where a kernel spills, or where a matrix kernel has no tensor-core instruction.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import typer

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is decorated: nothing could be compiled then
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

TARGETS = (80, 90, 100)
TENSOR_CORE = {80: r"\bHMMA\b|\bIMMA\b", 90: r"\bHGMMA\b|\bHMMA\b|\bIMMA\b", 100: r"\bUTC\w*MMA\b|\bHMMA\b|\bIMMA\b"}
"""Names of instructions that use the tensor cores, as the disassembler prints them."""


@dataclass
class Compiled:
    """`stack` above 0: registers are spilled to memory. `matrix`: it should use the tensor cores."""

    name: str
    target: str
    registers: int
    stack: int
    shared: int
    tensor_core_instructions: int
    matrix: bool
    problem: str | None = None


def compile_one(configuration, target: int) -> Compiled:
    """Raises what Triton's compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(configuration.signature)
    constexprs = {(names.index(name),): value for name, value in configuration.constexprs.items()}
    even = [
        name
        for name, kind in configuration.signature.items()
        if kind.startswith("*") or name in configuration.divisible_by_16
    ]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(
        fn=configuration.kernel,
        signature=dict(configuration.signature),
        constexprs=constexprs,
        attrs=attributes,
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    usage, code = _read(compiled.asm["cubin"])
    found = Compiled(
        configuration.name,
        f"sm_{target}",
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        tensor_core_instructions=len(re.findall(TENSOR_CORE[target], code)),
        matrix=configuration.matrix,
    )
    if found.stack:
        found.problem = "spills"
    elif found.matrix and not found.tensor_core_instructions:
        found.problem = "no tensor-core instruction"
    return found


_jobs: list = []  # a kernel cannot be sent to another process, which has them all from its start


def _take(jobs: list) -> None:
    _jobs[:] = jobs


def _compile(number: int) -> list[Compiled]:
    function, *arguments = _jobs[number]
    found = function(*arguments)
    return found if isinstance(found, list) else [found]


def compile_cuda_file(nvcc: str, source: Path, target: int) -> list[Compiled]:
    """Every kernel of a .cu file. Raises RuntimeError with what nvcc says where it refuses."""
    from bench.compile_cuda import compile_file

    return [Compiled(**kernel) for kernel in compile_file(nvcc, source, target, str(_cuobjdump()))]


def _cuobjdump() -> Path:
    """The tool that Triton brings along."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _read(cubin: bytes) -> tuple[str, str]:
    """(resource usage, disassembly)."""
    tool = _cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dumps = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        ]
    return dumps[0], dumps[1]


def all_configurations() -> list:
    """Those of every kernel module, sorted by module."""
    import var_fast.kernels

    found = []
    for module in sorted(pkgutil.iter_modules(var_fast.kernels.__path__), key=lambda module: module.name):
        found += getattr(importlib.import_module(f"var_fast.kernels.{module.name}"), "configurations", list)()
    return found


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON.")] = None,
    only: Annotated[str, typer.Option(help="Only configurations whose name holds this text.")] = "",
    targets: Annotated[str, typer.Option(help="Compute capabilities.")] = ",".join(map(str, TARGETS)),
) -> None:
    """Compile every kernel for every GPU generation, without a GPU, and show what it uses."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Column, Table

    from bench.compile_cuda import find_nvcc, sources

    nvcc, files = find_nvcc(), sources(only)
    chosen = [configuration for configuration in all_configurations() if only in configuration.name]
    wanted = [int(text) for text in targets.split(",") if text.strip().isdigit() and int(text) in TARGETS]
    if not (chosen or files) or not wanted:
        print(
            f"error: nothing to compile: no configuration named {only!r}, or targets {targets!r} unknown",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    console = Console(stderr=True)
    jobs: list[tuple] = [(compile_one, one, target) for one in chosen for target in wanted if target in one.targets]
    if nvcc is None and files:
        console.print(f"nvcc is not found: the {len(files)} files of csrc/cuda are left out")
    else:
        # first: one of them takes half a minute, which others fill if it is not the last
        jobs[:0] = [(compile_cuda_file, nvcc, file, target) for file in files for target in wanted]
    with ProcessPoolExecutor(mp_context=get_context("fork"), initializer=_take, initargs=(jobs,)) as pool:
        running = pool.map(_compile, range(len(jobs)))
        running = track(running, "compiling", len(jobs), console=console, disable=not console.is_terminal)
        found = [one for several in running for one in several]
    table = Table(Column("kernel", overflow="fold"), "target", "regs", "stack", "shared", "mma", "problem", box=None)
    for one in found:
        numbers = (one.registers, one.stack, one.shared, one.tensor_core_instructions)
        table.add_row(one.name, one.target, *map(str, numbers), one.problem or "")
    Console().print(table)
    if json_file is not None:
        from var_fast.images import whole_file

        with whole_file(json_file) as temporary:
            Path(temporary).write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    if any(one.problem for one in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    typer.run(main)
