"""The public training loop runs unchanged on our modules and gives its numbers.

VAR_PUBLIC_CODE=PATH names a checkout of the public code, which is not in this repository; without it this is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("VAR_PUBLIC_CODE", "")


def run(whose: str) -> dict:
    script = Path(__file__).with_name("public_loop.py")
    root = script.parents[2]
    done = subprocess.run(
        [sys.executable, str(script), CHECKOUT, whose],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not CHECKOUT, reason="VAR_PUBLIC_CODE names no checkout of the public code")
def test_public_training_loop_gives_the_same_numbers_on_our_modules():
    """Eight steps with accumulation, label smoothing, drop path and progressive stages, then its evaluation. Float32
    losses and gradient norms agree to 1e-5, four steps of AdamW included."""
    ours, theirs = run("ours"), run("theirs")
    assert len(ours["steps"]) == len(theirs["steps"]) == 4
    for a, b in zip(ours["steps"], theirs["steps"]):
        assert a == pytest.approx(b, rel=1e-5)
    assert [n is None for n in ours["norms"]] == [True, False] * 4
    assert ours["held_out"] == pytest.approx(theirs["held_out"], rel=1e-5)
