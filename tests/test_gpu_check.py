"""make gpu-check: a test run of its own, summed up in JSON; without a GPU it says so and fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from var_fast import gpu_check

ROOT = Path(__file__).parents[1]
MARKER = "pytest.mark." + "gpu"  # in two parts, or this file would be taken for one with gpu tests


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs the gpu tests where there is a GPU: make gpu-check does that"
)
def test_without_a_gpu(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "var_fast.gpu_check"],
        cwd=ROOT,
        env=os.environ | {"OUT": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 1
    assert "gpu tests passed on no CUDA device" in run.stdout
    assert "test_logits[adaln_l2norm-float32]" in run.stdout
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert any("test_golden_gpu" in name for name in written["tests"])
    assert all(test["outcome"] == "skipped" and test["message"] for test in written["tests"].values())
    assert written["machine"]["cuda"]["devices"] == []


@pytest.mark.parametrize(
    ("cpus", "xdist", "options", "threads"),
    [(16, True, ["-n", "12", "--dist", "worksteal"], "1"), (8, True, ["-n", "6", "--dist", "worksteal"], "1")]
    + [(16, False, [], None), (2, True, [], None)],
)
def test_in_parallel(monkeypatch, cpus, xdist, options, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: object() if xdist else None)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert gpu_check.in_parallel() == options and os.environ.get("OMP_NUM_THREADS") == threads


def test_files_with_gpu_tests(tmp_path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "ops").mkdir()
    (tmp_path / "gpu" / "test_a.py").write_text(f"pytestmark = {MARKER}")
    (tmp_path / "ops" / "test_b.py").write_text(f"@{MARKER}\ndef test(): pass")
    (tmp_path / "ops" / "test_c.py").write_text("import hypothesis")
    found = gpu_check.files_with_gpu_tests(tmp_path)
    assert found == [str(tmp_path / "gpu"), str(tmp_path / "ops" / "test_b.py")]
    assert str(Path(__file__)) not in gpu_check.files_with_gpu_tests(ROOT / "tests")


@pytest.mark.parametrize(
    ("files", "code", "outcomes"),
    [
        ({"a": "def test(): pass", "b": "import no_such_package"}, 0, ["passed", "skipped"]),
        ({"a": "def test(): pass", "gpu/b": "import no_such_package"}, 1, ["failed", "passed"]),
        ({"a": "def test(): pass", "b": "import var_fast.no_such_part"}, 1, ["failed", "passed"]),
        ({"a": "def test(): pass", "b": "1 / 0"}, 1, ["failed", "passed"]),
        ({"a": "def test(): pass", "b": "def test(): assert False"}, 1, ["failed", "passed"]),
        ({"b": "import no_such_package"}, 1, ["skipped"]),
    ],
)
def test_a_file_that_does_not_load_stops_no_other(tmp_path, monkeypatch, capsys, files, code, outcomes):
    """In plain text too: rich is hidden."""
    (tmp_path / "gpu").mkdir()
    for place, text in files.items():
        folder, name = (tmp_path / place).parent, Path(place).name
        # named after this test's own folder: Python keeps what the run before has imported under its name
        (folder / f"{tmp_path.name}_{name}.py").write_text(f"import pytest\npytestmark = {MARKER}\n{text}\n")
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "out.json"), str(tmp_path)])
    assert gpu_check.main() == code
    tests = json.loads((tmp_path / "out.json").read_text())["tests"].values()
    assert sorted(test["outcome"] for test in tests) == outcomes
    assert all(test["message"] for test in tests if test["outcome"] != "passed")
    assert f"{outcomes.count('passed')} of {len(outcomes)} gpu tests passed" in capsys.readouterr().out


def test_figures_of_the_benchmark(tmp_path, monkeypatch, capsys):
    row = dict(suite="sample", case="d16", dtype="bfloat16", batch=1, implementation="var_fast", skipped=None)
    rows = [row | dict(median_s=0.004, floor_s=0.002), row | dict(median_s=None, floor_s=0.002, skipped="no memory")]
    run = tmp_path / "bench" / "run.py"
    run.parent.mkdir()
    text = "import json, pathlib, sys\nout = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\nout.mkdir()\n"
    run.write_text(text + f"(out / 'report.json').write_text(json.dumps(dict(rows={rows!r})))\nsys.exit(1)\n")
    gpu_check.print_figures(gpu_check.short_benchmark(tmp_path, "ops", tmp_path / "out"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "sample  d16 bfloat16 batch 1 var_fast: 4.000 ms, 50% of floor"
    assert printed[1].endswith("var_fast: no memory")
    run.write_text("raise SystemExit('no device')")
    gpu_check.print_figures(gpu_check.short_benchmark(tmp_path, "ops", tmp_path / "none"))
    assert capsys.readouterr().out == "benchmark: not run: no device\n"
