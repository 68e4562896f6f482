"""What a report is written as: numbers, tables, Markdown, plots, and the schema of its JSON."""

from __future__ import annotations

import builtins
import copy
import io
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from bench.output import numbers
from bench.output.content import operator_totals, timeline
from bench.output.markdown import escape, write_markdown
from bench.output.plot_style import STYLES, styles
from bench.output.plots import plots_problem, write_plots
from bench.output.table import print_report
from bench.rows import Report, Row
from var_fast.errors import UserError

FIXTURE = Path(__file__).parent / "sample_report.json"
SCHEMA = json.loads((Path(__file__).parents[2] / "bench" / "report.schema.json").read_text())
ROW = Row("ops", "case", "reference", "cpu", "float32", 1)
RATES = {"copy_bytes_per_s": 1e10, "flops_per_s": {"float32": 1e12}}


@pytest.fixture
def report() -> Report:
    return Report.read(FIXTURE)


def printed(report: Report, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(console, report)
    return console.file.getvalue()


def words(text: str) -> str:
    return " ".join(text.split())


# --- numbers


def test_numbers_by_hand():
    assert [numbers.digits(x) for x in (0, 0.01234, 1.2345, 9.999, 99.96, 123.4, 12345.6)] == [
        *("0", "0.0123", "1.23", "10.0", "100", "123", "12,346")
    ]
    assert [numbers.seconds(x) for x in (None, 0.0, 8.5, 0.99996, 0.0123, 4.56e-5, 1e-7)] == [
        *("-", "0 s", "8.50 s", "1.00 s", "12.3 ms", "45.6 us", "0.100 us")
    ]
    assert numbers.spread(replace(ROW, p10_s=0.0009, p90_s=0.0012)) == "0.900-1.20 ms", "one unit for both"
    assert [numbers.memory(x) for x in (None, 12, 2048, 3 << 20, 5 << 29)] == [
        *("-", "12 B", "2.00 KiB", "3.00 MiB", "2.50 GiB")
    ]
    assert [numbers.times(x) for x in (1.317, 15.16, 0.0661)] == ["x1.32", "x15.2", "x0.0661"]
    assert numbers.decibels(None) == "identical" and numbers.decibels(51.26) == "51.3 dB"


def test_agreement_is_never_rounded_up():
    assert numbers.agreement(0.999999) == "99.99%"
    assert numbers.agreement(1.0) == "100%"
    assert numbers.agreement(0.57) == "57.00%"


@settings(deadline=None, max_examples=200)
@given(st.floats(1e-8, 1e5))
def test_seconds_can_be_read_back(value):
    number, unit = numbers.seconds(value).replace(",", "").split()
    # three digits: half of the last one is at most 0.5%
    assert float(number) * {"s": 1, "ms": 1e-3, "us": 1e-6}[unit] == pytest.approx(value, rel=5.1e-3)
    assert unit == "us" or float(number) >= 1


def test_throughput_is_of_what_binds():
    images = replace(ROW, images=4, median_s=0.5)
    assert numbers.throughput(images, RATES) == "8.00 images/s"
    # 1e12 operations take 1 s at least, 1e9 bytes 0.1 s
    arithmetic = replace(ROW, flops=1e12, bytes=1e9, median_s=2.0)
    assert numbers.throughput(arithmetic, RATES) == "500 GFLOP/s"
    assert numbers.throughput(replace(arithmetic, median_s=0.5), RATES) == "2.00 TFLOP/s"
    assert numbers.throughput(replace(arithmetic, bytes=2e10), RATES) == "10.0 GB/s"
    assert numbers.throughput(replace(arithmetic, bytes=2e10), {}) == "500 GFLOP/s", "no rates: products count"
    assert numbers.throughput(ROW, RATES) == "-"


def test_share_of_floor():
    assert numbers.share_of_floor(replace(ROW, floor_s=0.25, median_s=1.0)) == "25%"
    assert numbers.share_of_floor(replace(ROW, floor_s=0.015, median_s=1.0)) == "1.5%"
    assert numbers.share_of_floor(replace(ROW, floor_s=1e-4, median_s=1.0)) == "<0.1%"
    assert numbers.share_of_floor(replace(ROW, median_s=1.0)) == "-"


# --- schema


def invalid(content: dict) -> str:
    """The path of the first thing the schema finds wrong; "" if nothing."""
    errors = list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(content))
    return "/".join(map(str, errors[0].absolute_path)) or errors[0].message if errors else ""


def test_schema_accepts_reports(report):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert invalid(Report({}, {}).to_json()) == ""
    assert invalid(report.to_json()) == ""
    assert invalid(json.loads(FIXTURE.read_text())) == ""
    assert report.to_json() == json.loads(FIXTURE.read_text())


def test_schema_has_the_fields_of_the_classes():
    row = SCHEMA["properties"]["rows"]["items"]
    assert list(row["properties"]) == [field.name for field in fields(Row)] == row["required"]
    top = {field.name for field in fields(Report)} | {"schema", "version"}
    assert set(SCHEMA["properties"]) == top == set(SCHEMA["required"])


def test_schema_describes_everything():
    def check(part: dict, path: str) -> None:
        for name, inner in part.get("properties", {}).items():
            assert inner.get("description"), f"{path}/{name} has no description"
            check(inner, f"{path}/{name}")
        if isinstance(part.get("items"), dict) and "properties" in part["items"]:
            check(part["items"], f"{path}[]")

    check(SCHEMA, "")
    for name, field in SCHEMA["properties"]["rows"]["items"]["properties"].items():
        unit = {"s": "second", "bytes": "byte"}.get(name.rsplit("_", 1)[-1])
        assert unit is None or name == "images_per_s" or unit in field["description"], f"{name}: no unit"


@pytest.mark.parametrize(
    "where, value",
    [
        ("version", 2),
        ("rows/0/median_s", "fast"),
        ("rows/0/median_s", -1.0),
        ("rows/0/unknown", 1),
        ("rows/0/skipped", "has a time and a reason"),
        ("rows/0/ratio/var_fast", 0.0),
        ("quality/0/token_agreement", 1.5),
        ("timeline/spans/0/seconds", None),
        ("seconds/total", "long"),
    ],
)
def test_schema_refuses(where, value):
    content = copy.deepcopy(json.loads(FIXTURE.read_text()))
    *path, last = [int(key) if key.isdigit() else key for key in where.split("/")]
    part = content
    for key in path:
        part = part[key]
    part[last] = value
    assert invalid(content)


def test_schema_wants_a_reason_for_what_is_skipped(report):
    content = report.to_json()
    skipped = next(row for row in content["rows"] if row["median_s"] is None)
    skipped["skipped"] = None
    assert invalid(content)


def test_fixture_says_that_it_is_one(report):
    assert report.environment["cpu"]["model"].startswith("FIXTURE: invented numbers")


# --- the terminal


def test_table_says_everything_at_100_columns(report):
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    lines = [words(line) for line in text.splitlines()]
    assert "d16, float32, batch 1, floor 250 ms" in lines
    assert "var_fast 800 ms 776-832 ms 1.25 images/s 31% 256 MiB x1.25 vs reference" in lines
    assert "linear_gelu L680 forward, float32, batch 1, floor 57.0 ms" in lines
    assert "reference 65.5 ms 63.5-68.1 ms 87.0 GFLOP/s 87% 24.0 MiB -" in lines
    assert any("16.2 GB/s" in line for line in lines)
    for row in report.rows:
        assert row.skipped is None or row.skipped in words(text), "a reason folds, and is whole"
    assert "var_fast bfloat16 99.99%" in words(text)
    assert "in no operator 18.5 ms 2.9%" in words(text)
    assert all(note in words(text) for note in report.notes)
    assert "the run took 200.0 s: timed 150.0 s (75%), warm up 30.0 s (15%)" in text
    assert "copy 20.0 GB/s, products in float32 100 GFLOP/s" in text


def test_table_gives_all_ratios_of_many_implementations(report):
    names = ["reference", "var_fast", "compile", "published", "published-autocast"]
    times = dict(zip(names, (1.0, 0.5, 0.8, 1.1, 0.9)))
    report.rows = [
        replace(
            report.rows[0],
            implementation=name,
            median_s=time,
            ratio={other: times[other] / time for other in names if other != name},
        )
        for name, time in times.items()
    ]
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "x2.00 vs reference, x1.60 vs compile, x2.20 vs published, x1.80 vs published-autocast" in text


def test_table_gives_a_reason_once(report):
    reason = "needs a GPU"
    skipped = replace(ROW, skipped=reason, implementation="flex")
    report.rows = [skipped, replace(skipped, case="other"), replace(skipped, case="third", skipped="another reason")]
    text = printed(report)
    assert text.count(f"skipped: {reason}") == 1 + 1, "the quality gate has one such row too"
    assert text.count("skipped as above") == 1
    assert "skipped: another reason" in text


def test_table_warns(report):
    assert "interrupted" not in printed(report) and "throttled" not in printed(report)
    report.interrupted = True
    report.environment["nvml"] = {"before": {}, "after": {}, "throttled": ["power cap", "thermal slowdown"]}
    assert "interrupted: only what was finished is here" in printed(report)
    assert "the GPU was throttled: power cap, thermal slowdown" in printed(report)


def test_table_takes_text_as_it_is(report):
    """[bold] and [/] in a reason are no commands of rich's."""
    report.rows = [replace(ROW, skipped="[bold] then [/wrong] [Errno 2]")]
    assert "skipped: [bold] then [/wrong] [Errno 2]" in printed(report)


def test_empty_report_is_printed():
    assert "unknown machine, torch unknown, commit unknown" in printed(Report({}, {}))


def test_timeline_totals(report):
    assert list(operator_totals(report.timeline))[0] == "decoder"
    without = {**report.timeline, "totals_s": {}}
    assert operator_totals(without) == pytest.approx(operator_totals(report.timeline), rel=1e-3)
    rows = timeline(report).rows
    assert rows[-1] == ["total", "634 ms", ""]
    # shares are rounded to 0.05 or 0.5 percent
    assert sum(float(row[2].rstrip("%")) for row in rows[:-1]) == pytest.approx(100, abs=2)


# --- Markdown


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_says_everything(report, tmp_path):
    plots = [tmp_path / "plots" / "a b.png", tmp_path / "c.png"]
    write_markdown(report, tmp_path / "report.md", plots)
    text = (tmp_path / "report.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"], "no temporary file is left"
    assert text.index("| environment |") < text.index(report.command) < text.index("How to read")
    assert text.index("How to read") < text.index("sample on cpu")
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert all(len(line) == len(next_line) for line, next_line in zip(lines, lines[1:]) if set(next_line) == {"---"})
    fast = next(line for line in lines if line[:4] == ["d16", "var_fast", "float32", "1"])
    assert fast[4:] == [
        *("800 ms", "776-832 ms", "1.25 images/s", "250 ms", "31%", "256 MiB"),
        "x1.25 vs reference, x1.31 vs published",
    ]
    assert "![a b](plots/a%20b.png)" in text and "![c](c.png)" in text
    assert "\\[Errno 2\\] No such file or directory: 'g++' &lt;none&gt; \\| not found" in text
    assert all(note in text for note in report.notes)
    assert "skipped: triton float16: needs a GPU" in text
    assert "copy 20.0 GB/s (256 MiB)" in text, "and what reached the rate"
    table = [line for line in text.split("## ops on cpu")[1].split("##")[0].splitlines() if line.startswith("|")]
    assert len({len(cells(line)) for line in table}) == 1, "a pipe in a reason makes no cell"


def test_markdown_escapes():
    assert escape("a|b <c> *d* `e` [f]\n_g_ var_fast") == "a\\|b &lt;c&gt; \\*d\\* \\`e\\` \\[f\\] \\_g\\_ var_fast"


def test_markdown_keeps_the_old_file_if_it_fails(report, tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        write_markdown(report, path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]
    assert path.read_bytes() == b"old"


# --- plots


def colours(picture: Image.Image) -> set[str]:
    """Colours of at least 20 pixels, which no smoothed edge has."""
    counted = picture.convert("RGB").getcolors(1 << 24)
    return {"#{:02X}{:02X}{:02X}".format(*colour) for count, colour in counted if count >= 20}


def test_plots_are_pictures_with_the_colours_of_their_implementations(report, tmp_path):
    paths = write_plots(report, tmp_path / "new" / "plots")
    assert [path.name for path in paths] == [
        "sample_d16.png",
        "train_demo.png",
        "tokenize_demo-image-to-tokens.png",
        "ops_roofline.png",
        "ops_bandwidth.png",
        "timeline.png",
    ]
    assert sorted((tmp_path / "new" / "plots").iterdir()) == sorted(paths), "no temporary file is left"
    seen = {}
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert 700 <= picture.width <= 2000 and 250 <= picture.height <= 1500
            seen[path.name] = colours(picture)
    names = ("reference", "var_fast", "compile", "published")
    look = {name: style.colour.upper() for name, style in styles(names).items()}
    floor = "#666666"
    assert {look["reference"], look["var_fast"], look["published"], floor} <= seen["sample_d16.png"]
    assert look["compile"] not in seen["sample_d16.png"], "what was skipped is not drawn"
    assert {look["reference"], look["compile"], floor} <= seen["train_demo.png"]
    assert styles(["sdpa"])["sdpa"].colour.upper() in seen["ops_roofline.png"]


def test_plots_leave_out_what_there_is_not(tmp_path):
    assert write_plots(Report({}, {}), tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
    alone = replace(ROW, median_s=0.1, flops=1e9, bytes=1e6)
    assert [path.name for path in write_plots(Report({}, {}, rows=[alone]), tmp_path)] == ["ops_roofline.png"]


def test_plots_of_one_case_on_two_devices_have_two_names(report, tmp_path):
    row = replace(ROW, suite="sample", images=1, median_s=0.1)
    rows = [row, replace(row, device="cuda")]
    assert [path.name for path in write_plots(Report({}, {}, rows=rows), tmp_path)] == [
        "sample_case_cpu.png",
        "sample_case_cuda.png",
    ]


def test_without_matplotlib_there_are_no_plots_and_a_reason(report, tmp_path, monkeypatch):
    assert plots_problem() is None
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install matplotlib" in plots_problem() and "\n" not in plots_problem()
    assert write_plots(report, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_plots_where_nothing_can_be_written(report, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the directory"):
        write_plots(report, tmp_path / "file" / "plots")


def test_styles_are_distinct_and_stay():
    names = ["native", "reference", "triton", "var_fast"]
    look = styles(names)
    assert len(set(look.values())) == len(names) and len({style.marker for style in look.values()}) == len(names)
    assert look["reference"] == styles(["reference"])["reference"] == STYLES[0]
    assert len(styles([f"peer {i}" for i in range(20)])) == 20
