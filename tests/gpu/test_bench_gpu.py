"""bench/run.py on a CUDA device."""

import pytest

from bench.rows import Report
from bench.run import main


@pytest.mark.gpu
def test_a_short_report(tmp_path):
    arguments = ["--suite", "sample,ops", "--models", "demo", "--batch", "1", "--dtype", "bfloat16", "--peer", "sdpa"]
    arguments += ["--only", "qk_norm forward 64x680", "--rounds", "2", "--seconds", "0", "--device", "cuda"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    report = Report.read(tmp_path / "report.json")
    assert not [note for note in report.notes if "failed" in note]
    assert all(row.skipped is None and row.median_s > 0 for row in report.rows)
    assert [row.graph for row in report.rows] == [row.suite == "ops" for row in report.rows]
    found = {(row.suite, row.implementation) for row in report.rows}
    assert found == {("sample", "reference"), ("sample", "var_fast"), ("ops", "reference"), ("ops", "triton")}
    assert report.timeline["totals_s"]["matrix products"] > 0
