"""make gpu-check: a test run of its own, summed up in JSON; without a GPU it says so and fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs the gpu tests where there is a GPU: make gpu-check does that"
)
def test_without_a_gpu(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "var_fast.gpu_check", "tests/gpu"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OUT": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    assert "gpu tests passed on no CUDA device" in run.stdout
    assert "test_logits[adaln_l2norm-float32]" in run.stdout
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert any("test_golden_gpu" in name for name in written["tests"])
    assert all(test["outcome"] == "skipped" and test["message"] for test in written["tests"].values())
    assert written["machine"]["cuda"]["devices"] == []
