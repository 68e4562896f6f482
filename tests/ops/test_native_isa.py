"""The native operators on every instruction set that this machine has, each in a process of its own."""

from __future__ import annotations

import pytest

from tests.ops.on_isa import ISAS, run_on, start_on
from var_fast import _C

ASK = "import torch; from var_fast import _C; _C.cpu_isa()"


@pytest.mark.parametrize("isa", ISAS)
def test_numbers(isa):
    assert run_on(isa, "-m", "tests.ops.native_checks").stdout.split()[0] == isa


def test_an_unknown_instruction_set_is_an_error():
    done = start_on("sse9", "-c", ASK)
    assert "ValueError: VAR_FAST_ISA is sse9, expected portable, avx2" in done.stderr


@pytest.mark.skipif(_C.cpu_isa() == "amx", reason="this machine has all")
def test_one_that_the_machine_lacks_is_an_error():
    done = start_on("amx", "-c", ASK)
    assert "ValueError: VAR_FAST_ISA is amx, this machine has " in done.stderr
