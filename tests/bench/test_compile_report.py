"""The offline compiler report: it sees spills and missing tensor cores, and the kernels have neither."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile_cuda import find_nvcc, parse

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
    assert {row["target"] for row in rows} == {"sm_90"} | ({"sm_90a"} if find_nvcc() else set())
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


def test_what_ptxas_prints():
    kernels = parse("""\
ptxas info    : 0 bytes gmem, 24 bytes cmem[4]
ptxas info    : Compiling entry function '_Z4evenPf' for 'sm_90a'
ptxas info    : Function properties for _Z4evenPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 50 registers, used 1 barriers, 256 bytes smem
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90a'
ptxas info    : Function properties for _Z5spillPf
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 8 bytes cumulative stack size
""")
    assert kernels == [
        {"name": "_Z4evenPf", "problem": None, "stack": 0, "registers": 50, "shared": 256},
        {"name": "_Z5spillPf", "problem": "spills", "stack": 8, "registers": 32, "shared": 0},
    ]


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
def test_cuda_kernels(tmp_path):
    file = tmp_path / "report.json"
    done = run("--json", file, "--only", "cuda/scale_attention", "--targets", "80,90")
    rows = {(row["name"], row["target"]): row for row in json.loads(file.read_text())}
    assert done.returncode == 0, done.stdout
    assert {target for _, target in rows} == {"sm_80", "sm_90a"}
    product = rows["cuda/scale_attention: attention_mma<bf16, 64>", "sm_90a"]
    assert product["matrix"] and product["tensor_core_instructions"] > 0 and 0 < product["registers"] <= 255
    assert not rows["cuda/scale_attention: attention_f32<64>", "sm_80"]["matrix"]


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
def test_a_cuda_kernel_that_spills(tmp_path):
    source = tmp_path / "wide.cu"
    source.write_text("""
__global__ void __launch_bounds__(1024) wide_mma(float* x) {
    float values[200];
    for (int i = 0; i < 200; ++i) values[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = values[(i * 7) % 200] * values[199 - i];
}
__global__ void thin_mma(float* x) { x[threadIdx.x] *= 2; }
""")
    script = tmp_path / "check.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from bench import compile_report
from bench.compile_cuda import find_nvcc
for one in compile_report.compile_cuda_file(find_nvcc(), compile_report.Path({str(source)!r}), 80):
    print(one.name, one.problem)
""")
    done = run(script=script)
    assert sorted(done.stdout.splitlines()) == [
        "cuda/wide: thin_mma no tensor-core instruction",
        "cuda/wide: wide_mma spills",
    ], done.stderr


def test_without_nvcc(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert find_nvcc() is None


def test_an_unknown_name_is_one_line():
    done = run("--only", "no such kernel")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
