"""The native operators on every instruction set that this machine has, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from var_fast.ops.backend import native_problem

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=str(native_problem()))
ROOT = Path(__file__).parents[2]


def run(isa, *command):
    environment = os.environ | {"VAR_FAST_ISA": isa, "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_numbers(isa):
    done = run(isa, "-m", "tests.ops.native_checks")
    if "this machine has" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == isa


def test_an_unknown_instruction_set_is_an_error():
    done = run("sse9", "-c", "import torch; from var_fast import _C; _C.cpu_isa()")
    assert "ValueError: VAR_FAST_ISA is sse9, expected portable, avx2" in done.stderr
