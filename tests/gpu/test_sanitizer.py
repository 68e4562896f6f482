"""Every Triton kernel and the native loop under compute-sanitizer: no access out of bounds, no race in shared
memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.gpu
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_kernels_are_clean(check):
    # PyTorch's caching allocator would hide what is beyond a tensor but within its block
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        # racecheck finds fault with cuDNN's own attention
        [TOOL, "--tool", check, "--kernel-name-exclude", "kernel_substring=cudnn_generated", "--error-exitcode", "7"]
        + [sys.executable, "-m", "tests.gpu.small_kernels"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=280,
    )
    assert "ran scale_attention" in done.stdout, done.stderr[-2000:]
    assert "ran the CUDA operators" in done.stdout, done.stderr[-2000:]
    assert "ran the native loop torch.float16" in done.stdout, done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-4000:]
