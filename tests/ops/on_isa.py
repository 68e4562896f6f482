"""Processes that are held to one instruction set of the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from var_fast import _C

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
ROOT = Path(__file__).parents[2]


def run_on(isa: str, *command: str) -> subprocess.CompletedProcess:
    """`python *command` with VAR_FAST_ISA; skips the test where the machine lacks it, fails it if the command does."""
    here = _C.cpu_isa()
    if ISAS.index(isa) > ISAS.index(here):
        pytest.skip(f"this machine has {here} at best")
    done = start_on(isa, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def start_on(isa: str, *command: str) -> subprocess.CompletedProcess:
    """As `run_on`, whatever comes of it."""
    environment = os.environ | {"VAR_FAST_ISA": isa, "OMP_NUM_THREADS": "2"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def rerun_on(isa: str, file: str, chosen: str = "not every_instruction_set") -> None:
    """The other tests of a test file, or those that `chosen` (pytest's -k) names."""
    if isa == _C.cpu_isa():
        pytest.skip(f"the tests themselves run on {isa}")
    run_on(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", chosen)
