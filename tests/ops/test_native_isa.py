"""The native operators on every instruction set that this machine has, each in a process of its own."""

from __future__ import annotations

import pytest

from tests.ops.on_isa import ISAS, run_on, start_on
from var_fast.ops.backend import native_problem

pytestmark = pytest.mark.skipif(native_problem() is not None, reason=str(native_problem()))


@pytest.mark.parametrize("isa", ISAS)
def test_numbers(isa):
    assert run_on(isa, "-m", "tests.ops.native_checks").stdout.split()[0] == isa


def test_an_unknown_instruction_set_is_an_error():
    done = start_on("sse9", "-c", "import torch; from var_fast import _C; _C.cpu_isa()")
    assert "ValueError: VAR_FAST_ISA is sse9, expected portable, avx2" in done.stderr
