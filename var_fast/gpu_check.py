"""Runs the tests marked `gpu` on this machine's GPU, then the benchmark's short form: tables, and one JSON file
(python -m var_fast.gpu_check)."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch

import var_fast
from var_fast.doctor import report


class Outcomes:
    """A pytest plugin: each test's outcome and the seconds its set-up, call and tear-down took."""

    def __init__(self):
        self.tests: dict[str, dict] = {}

    def pytest_runtest_logreport(self, report):
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "message": ""})
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if not report.passed:
            test["outcome"] = report.outcome
            test["message"] = _message(report)

    def pytest_collectreport(self, report):
        """A file that cannot be loaded: a failure, but for a package missing here that only files outside gpu/ need."""
        if report.passed:
            return
        message = _message(report)
        missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", message)
        may_lack_it = "gpu" not in Path(report.nodeid).parts and missing and missing[1] not in ("var_fast", "tests")
        outcome = "skipped" if report.skipped or may_lack_it else "failed"
        self.tests[report.nodeid] = {"outcome": outcome, "seconds": 0.0, "message": message}


def _message(report) -> str:
    where_and_why = report.longrepr
    return where_and_why[2] if isinstance(where_and_why, tuple) else str(where_and_why)[-2000:]


def files_with_gpu_tests(tests: Path) -> list[str]:
    """The folder gpu/ of `tests`, and the other test files that mark a test `gpu`: the rest may need more packages."""
    others = (path for path in sorted(tests.rglob("test_*.py")) if tests / "gpu" not in path.parents)
    return [str(tests / "gpu"), *(str(path) for path in others if "pytest.mark.gpu" in path.read_text())]


def in_parallel() -> list[str]:
    """Options of pytest by which tests share the GPU, where pytest-xdist is installed: most of their time goes to
    compiling kernels, on a CPU. Sets OMP_NUM_THREADS for as many processes."""
    workers = min(12, (os.cpu_count() or 1) - 2)
    if workers < 2 or importlib.util.find_spec("xdist") is None:
        return []
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    return ["-n", str(workers), "--dist", "worksteal"]


def print_table(tests: dict[str, dict], device: str) -> None:
    """One line a test; in plain text where rich is not installed."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Column, Table
    except ImportError:
        for name, test in tests.items():
            print(f"{test['outcome']:7} {test['seconds']:8.2f} s  {device}  {name}")
        return
    table = Table(Column("test", overflow="fold"), "result", "seconds", "device", title="gpu-check")
    for name, test in tests.items():
        colour = {"passed": "green", "failed": "red", "skipped": "yellow"}[test["outcome"]]
        table.add_row(escape(name), f"[{colour}]{test['outcome']}[/]", f"{test['seconds']:.2f}", device)
    Console().print(table)


BENCHMARK = ("--rounds", "3", "--seconds", "0.2", "--peer", "sdpa", "--device", "cuda")
SHORT_BENCHMARKS = {
    "sample": ("--models", "d16", "--batch", "1,64", "--dtype", "bfloat16"),
    "ops": (
        *("--only", " 64x680x", "--only", "scale_attention forward + backward 16x680"),
        *("--only", "group_norm_silu forward", "--dtype", "bfloat16,float32"),
    ),
}
"""By suite of bench/run.py."""


def short_benchmark(root: Path, suite: str, out: Path, timeout_s: float = 120) -> list[dict] | str:
    """The rows of bench/run.py's report, of which `out` becomes the folder, or why there are none."""
    (out / "report.json").unlink(missing_ok=True)  # of an earlier run
    options = ("--suite", suite, *SHORT_BENCHMARKS[suite], *BENCHMARK, "--out", str(out))
    command = [sys.executable, str(root / "bench" / "run.py"), *options]
    try:
        # it writes its report after every case, so what is finished counts
        done = subprocess.run(command, cwd=root, timeout=timeout_s, capture_output=True, text=True)
        problem = None if done.returncode == 0 else (done.stderr.strip() or done.stdout.strip())[-500:]
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    try:
        rows = json.loads((out / "report.json").read_text())["rows"]
        if problem:
            print(f"benchmark: not finished: {problem}")
        return rows
    except (OSError, ValueError) as error:
        return problem or str(error)


def print_figures(rows: list[dict] | str) -> None:
    """One line for each row that has a time."""
    if isinstance(rows, str):
        print(f"benchmark: not run: {rows}")
        return
    for row in rows:
        name = f"{row['suite']:7} {row['case']} {row['dtype']} batch {row['batch']} {row['implementation']}"
        if row["median_s"] is None:
            print(f"{name}: {row['skipped']}")
            continue
        share = f", {row['floor_s'] / row['median_s']:.0%} of floor" if row["floor_s"] else ""
        print(f"{name}: {row['median_s'] * 1e3:.3f} ms{share}")


def main() -> int:
    """Returns 0 if at least one gpu test ran and none failed."""
    import pytest

    default = Path(os.environ.get("OUT", ".")) / "gpu_check.json"
    parser = argparse.ArgumentParser(prog="python -m var_fast.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write (default: %(default)s)")
    root = Path(var_fast.__file__).parents[1]
    parser.add_argument("--no-bench", action="store_true", help="leave the benchmark out")
    parser.add_argument("tests", nargs="*", help="files or folders (default: all that have gpu tests)")
    arguments = parser.parse_args()
    out: Path = arguments.out

    outcomes = Outcomes()
    with patch.dict(os.environ):  # what in_parallel sets is for the tests alone
        code = pytest.main(
            [
                *("-q", "-m", "gpu", "--continue-on-collection-errors", f"--rootdir={root}", *in_parallel()),
                *(arguments.tests or files_with_gpu_tests(root / "tests")),
            ],
            plugins=[outcomes],
        )

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print_table(outcomes.tests, device)
    results = [test["outcome"] for test in outcomes.tests.values()]
    passed = results.count("passed")
    out.parent.mkdir(parents=True, exist_ok=True)
    written = {"device": device, "machine": report(), "tests": outcomes.tests}
    out.write_text(json.dumps(written, indent=1) + "\n")
    if torch.cuda.is_available() and not arguments.no_bench:
        written["figures"] = {}
        for suite in SHORT_BENCHMARKS:
            rows = short_benchmark(root, suite, out.parent / "gpu_check_bench" / suite)
            written["figures"][suite] = rows
            print_figures(rows)
        out.write_text(json.dumps(written, indent=1) + "\n")
    print(f"{passed} of {len(results)} gpu tests passed on {device}; written to {out}")
    # a file that could not be loaded makes pytest answer 1; what that means here, the outcomes say
    finished = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return 0 if finished and passed and "failed" not in results else 1


if __name__ == "__main__":
    sys.exit(main())
