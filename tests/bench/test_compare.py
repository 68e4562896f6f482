"""Two reports side by side."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from bench.output.compare import change, differences, print_comparison
from bench.rows import Report, Row, ratio_to

ENVIRONMENT = {"cpu": {"model": "some CPU", "threads": 2}, "gpu": None, "torch": "2.13.0"}


def row(median: float, vs_reference: float | None = None, spread: float = 0.01, **fields) -> Row:
    """`spread`: from the 10% to the 90% point, of the median."""
    values = dict(suite="sample", case="d16", implementation="var_fast", device="cpu", dtype="float32", batch=1)
    return Row(
        **{**values, **fields},
        median_s=median,
        p10_s=median * (1 - spread / 2),
        p90_s=median * (1 + spread / 2),
        ratio={} if vs_reference is None else {"reference": vs_reference},
    )


def compared(old: list[Row], new: list[Row], new_environment: dict = ENVIRONMENT) -> str:
    """What is printed, each line with single spaces."""
    console = Console(file=io.StringIO(), width=100)
    print_comparison(console, Report(ENVIRONMENT, {}, rows=old), Report(new_environment, {}, rows=new))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    return "\n".join(" ".join(line.split()) for line in lines)


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        (row(1.0, 2.0), row(1.0, 2.0), ""),
        (row(1.0, 2.0), row(1.0, 1.92), ""),  # 4%
        (row(1.0, 2.0), row(1.0, 1.88), "slower"),  # 6%
        (row(1.0, 2.0), row(1.0, 2.2), "faster"),
        (row(1.0, 2.0, spread=0.2), row(1.0, 1.7), ""),  # 18%, less than the old spread
        (row(1.0, 2.0), row(1.0, 1.7, spread=0.2), ""),  # and than the new one
        (row(1.0, 2.0, spread=0.2), row(1.0, 1.6, spread=0.2), "slower"),  # 25%
        (row(1.0, 2.0), row(3.0, 2.0), "slower"),  # with what it shares with the reference: the ratio is the same
        (row(1.0), row(1.2), "slower"),  # no ratio: the time
        (row(1.0), row(0.8), "faster"),
        (row(1.0, 2.0), row(1.2), "slower"),  # a ratio in one report only
    ],
)
def test_verdict(old, new, verdict):
    assert change(old, new, times_count=True).verdict == verdict


def test_times_have_no_verdict_across_machines():
    assert change(row(1.0), row(2.0), times_count=False).verdict == ""
    assert change(row(1.0, 2.0), row(3.0, 2.0), times_count=False).verdict == ""
    assert change(row(1.0, 2.0), row(2.0, 1.0), times_count=False).verdict == "slower"


def test_reference_is_judged_by_its_time():
    then, now = (replace(row(median), implementation="reference", ratio={"var_fast": 1.0}) for median in (1.0, 1.5))
    result = change(then, now, times_count=True)
    assert (result.factor, result.relative, result.verdict) == (1.5, False, "slower")


def test_rows_are_matched_by_their_key():
    old = [row(1.0, 2.0), row(3.0, 2.0, batch=2), row(5.0, 1.5, case="d20")]
    new = [row(3.3, 2.02, batch=2), row(1.5, 1.25), row(0.25, 1.0, suite="train")]
    text = compared(old, new)
    # median then and now, new / old time, ratio then and now
    assert "1.00 s 1.50 s 1.50 x2.00 x1.25 slower" in text
    assert "3.00 s 3.30 s 1.10 x2.00 x2.02" in text
    assert "2 rows in both: 2 slower, 0 faster by more than 5%" in text
    assert "only in the old report:\nsample d20, float32, batch 1, cpu, var_fast: 5.00 s" in text
    assert "only in the new report:\ntrain d16, float32, batch 1, cpu, var_fast: 250 ms" in text
    assert "differ" not in text


def test_row_that_is_skipped_now_says_why():
    skipped = replace(row(1.0), median_s=None, p10_s=None, p90_s=None, skipped="[Errno 2] g++ is missing")
    text = compared([row(1.0)], [skipped])
    assert "no row was measured in both reports" in text
    assert "only in the old report:" in text and "only in the new" not in text
    assert "var_fast: 1.00 s, skipped in the other: [Errno 2] g++ is missing" in text.replace("\n", " ")
    assert "only in" not in compared([skipped], [skipped])


@pytest.mark.parametrize(
    "change, line",
    [
        ({"torch": "2.11.0"}, "torch: 2.13.0, now 2.11.0"),
        ({"cpu": {"model": "other CPU", "threads": 2}}, "cpu model: some CPU, now other CPU"),
        ({"cpu": {"model": "some CPU", "threads": 8}}, "cpu threads: 2, now 8"),
        ({"gpu": {"name": "NVIDIA H100"}}, "gpu name: none, now NVIDIA H100"),
    ],
)
def test_other_environments_are_named(change, line):
    text = compared([row(1.0)], [row(2.0)], {**ENVIRONMENT, **change})
    assert "the environments differ: times are not comparable" in text
    assert line in text
    assert "0 slower, 0 faster" in text, "no ratio, and times do not count"


def test_what_bears_on_no_time_is_no_difference():
    assert differences(ENVIRONMENT, {**ENVIRONMENT, "date": "2000-01-01", "commit": "abc"}) == {}
    assert differences({}, {"cpu": None}) == {}, "unknown is unknown"


def test_interrupted_reports_are_named():
    console = Console(file=io.StringIO(), width=100)
    print_comparison(console, Report({}, {}, interrupted=True), Report({}, {}))
    assert "the old report was interrupted" in console.file.getvalue()
    assert "the new report was interrupted" not in console.file.getvalue()


def test_ratio_to_a_peer_of_other_types_than_the_rows():
    half = row(1.0, dtype="bfloat16")
    half.ratio = {"published float16": 3.0, "sdpa": 2.0}
    assert [ratio_to(half, peer) for peer in ("published", "sdpa", "var_fast", "flex")] == [3.0, 2.0, 1.0, None]
    half.ratio["published float32"] = 5.0
    assert ratio_to(half, "published") == 5.0
