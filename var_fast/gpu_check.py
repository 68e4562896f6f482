"""Runs the tests marked `gpu` on this machine's GPU: one table, one JSON file (python -m var_fast.gpu_check)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

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
            where_and_why = report.longrepr
            test["message"] = where_and_why[2] if isinstance(where_and_why, tuple) else str(where_and_why)[-2000:]


def main() -> int:
    """Returns 0 if at least one gpu test ran and none failed."""
    import pytest

    default = Path(os.environ.get("OUT", ".")) / "gpu_check.json"
    parser = argparse.ArgumentParser(prog="python -m var_fast.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=default, help="JSON file to write (default: %(default)s)")
    root = Path(var_fast.__file__).parents[1]
    parser.add_argument("tests", nargs="*", default=[str(root / "tests")], help="files or folders (default: all tests)")
    arguments = parser.parse_args()
    out: Path = arguments.out

    outcomes = Outcomes()
    code = pytest.main(["-q", "-m", "gpu", f"--rootdir={root}", *arguments.tests], plugins=[outcomes])

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    table = Table(Column("test", overflow="fold"), "result", "seconds", "device", title="gpu-check")
    for name, test in outcomes.tests.items():
        colour = {"passed": "green", "failed": "red", "skipped": "yellow"}[test["outcome"]]
        table.add_row(escape(name), f"[{colour}]{test['outcome']}[/]", f"{test['seconds']:.2f}", device)
    console = Console()
    console.print(table)
    passed = sum(test["outcome"] == "passed" for test in outcomes.tests.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"device": device, "machine": report(), "tests": outcomes.tests}, indent=1) + "\n")
    console.print(f"{passed} of {len(outcomes.tests)} gpu tests passed on {device}; written to {out}")
    return 0 if code == 0 and passed else 1


if __name__ == "__main__":
    sys.exit(main())
