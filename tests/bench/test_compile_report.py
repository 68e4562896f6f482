"""The offline compiler report: it sees spills and missing tensor cores, and the kernels have neither."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*arguments, script=ROOT / "bench" / "compile_report.py"):
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_no_kernel_spills_and_matrix_kernels_use_tensor_cores(tmp_path):
    file = tmp_path / "report.json"
    done = run("--json", file, "--targets", "90")  # all three: make compile-report, some minutes
    rows = json.loads(file.read_text())
    assert done.returncode == 0, [row for row in rows if row["problem"]]
    assert {row["target"] for row in rows} == {"sm_90"}
    assert all(row["registers"] > 0 and row["stack"] == 0 for row in rows)
    assert all(row["tensor_core_instructions"] > 0 for row in rows if row["matrix"])


def test_spills_and_missing_tensor_cores_are_found(tmp_path):
    script = tmp_path / "check.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from bench import compile_report
import triton, triton.language as tl
from var_fast.kernels.configuration import Configuration

@triton.jit
def wide(x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    a = tl.load(x_ptr + at)
    b = tl.load(x_ptr + N + at)
    c = tl.load(x_ptr + 2 * N + at)
    tl.store(x_ptr + at, a * tl.sum(b) + b * tl.sum(c) + c * tl.sum(a))

@triton.jit
def product(x_ptr):
    at = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, tl.dot(x, x).to(x.dtype))

pointer = {{"x_ptr": "*fp32", "N": "constexpr"}}
print(compile_report.compile_one(Configuration("wide", wide, pointer, {{"N": 32768}}, num_warps=4), 90).problem)
print(compile_report.compile_one(Configuration("thin", wide, pointer, {{"N": 128}}, matrix=True), 80).problem)
print(compile_report.compile_one(Configuration("dot", product, {{"x_ptr": "*fp16"}}, {{}}, matrix=True), 90).problem)
""")
    done = run(script=script)
    assert done.stdout.split("\n")[:3] == ["spills", "no tensor-core instruction", "None"], done.stderr


def test_an_unknown_name_is_one_line():
    done = run("--only", "no such kernel")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
