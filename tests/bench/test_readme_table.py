"""The speed tables of README files are those of the committed reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from bench.readme_table import fill, main
from var_fast.errors import UserError

ROOT = Path(__file__).parents[2]
FIXTURE = Path(__file__).parent / "sample_report.json"
TEXT = """# Title

Before.

<!-- speed: results/fixture.json suite=sample case=d16 batch=1 against=published -->
old
<!-- /speed -->

Between.

<!-- speed: results/fixture.json suite=tokenize case="demo image to tokens" dtype=bfloat16 -->
<!-- /speed -->

After.
"""


@pytest.fixture
def readme(tmp_path) -> Path:
    (tmp_path / "results").mkdir()
    shutil.copy(FIXTURE, tmp_path / "results" / "fixture.json")
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    return path


def run(*arguments) -> tuple[int, str]:
    app = Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("name", ["README.md", "bench/README.md"])
def test_tables_of_this_repository_are_those_of_its_reports(name):
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"there is no {name}")
    text = path.read_text(encoding="utf-8")
    assert fill(text, path)[0] == text, f"run python bench/readme_table.py {name}"


def test_tables_are_written_and_then_agree(readme):
    assert run("--check", readme)[0] == 1
    assert readme.read_text() == TEXT, "--check writes nothing"
    assert run(readme) == (0, f"{readme}: 2 tables written\n")
    text = readme.read_text()
    lines = text.splitlines()
    assert "| implementation | dtype | batch | median | p10-p90 | images/s | time / published's |" in lines
    assert "| var_fast | float32 | 1 | 800 ms | 776-832 ms | 1.25 | 0.76 |" in lines
    assert "| published | float32 | 1 | 1.05 s | 1.02-1.09 s | 0.952 | 1.00 |" in lines
    assert "| var_fast | bfloat16 | 4 | 140 ms | 136-146 ms | 28.6 | 0.87 |" in lines
    assert "time / reference's" in text, "if no other is named"
    assert "| compile | float32 | 1 | skipped: torch.compile needs a C++ compiler" in text
    assert [line for line in lines if line.startswith("FIXTURE")] == [
        "FIXTURE: invented numbers for tests, not a measurement (2 threads), torch 0.0.0+fixture, commit 0123456789ab, "
        "2000-01-01, `python bench/run.py --json tests/bench/sample_report.json`: [fixture.json](results/fixture.json)"
    ] * 2
    assert "old" not in lines
    assert [line for line in lines if line in TEXT.splitlines() and line] == [
        line for line in TEXT.splitlines() if line and line != "old"
    ], "all else stays"
    assert run("--check", readme) == (0, f"{readme}: 2 tables as in the reports\n")
    assert run(readme)[0] == 0 and readme.read_text() == text, "a second run changes nothing"


def test_changed_number_is_found(readme):
    run(readme)
    text = readme.read_text()
    readme.write_text(text.replace("| 800 ms |", "| 700 ms |"))
    code, output = run("--check", readme)
    assert code == 1
    assert output == f"{readme}: its tables differ from the reports: python bench/readme_table.py {readme}\n"
    run(readme)
    assert readme.read_text() == text, "and put right"


def test_changed_report_is_found(readme):
    run(readme)
    path = readme.parent / "results" / "fixture.json"
    content = json.loads(path.read_text())
    row = next(row for row in content["rows"] if row["implementation"] == "var_fast")
    row["median_s"] *= 1.01
    path.write_text(json.dumps(content))
    assert run("--check", readme)[0] == 1


def test_columns_for_what_is_not_one(readme):
    table, count = fill("<!-- speed: results/fixture.json implementation=var_fast -->\n<!-- /speed -->", readme)
    assert count == 1
    assert "| suite | case | implementation | dtype |" in table
    operators, _ = fill("<!-- speed: results/fixture.json suite=ops -->\n<!-- /speed -->", readme)
    assert "| throughput |" in operators and "50.0 GFLOP/s" in operators
    two, _ = fill("<!-- speed: results/fixture.json suite=sample batch=1,4 -->\n<!-- /speed -->", readme)
    batches = {line.split("|")[3].strip() for line in two.splitlines() if line.startswith("| var_fast")}
    assert batches == {"1", "4"}


def test_markers_in_code_are_text(readme):
    text = "```\n<!-- speed: nothing.json -->\n```\n````md\n```\n<!-- /speed -->\n````\n"
    assert fill(text, readme) == (text, 0)


def test_text_without_markers_stays(readme):
    text = "a\r\n\x0b b\u2028c\n\n"
    assert fill(text, readme) == (text, 0)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("no marker", "has no marker"),
        ("<!-- speed: results/fixture.json -->\n", "line 1: <!-- speed: has no <!-- /speed --> after it"),
        ("a\n<!-- /speed -->\n", "line 2: <!-- /speed --> has no <!-- speed: before it"),
        ("<!-- speed: results/fixture.json -->\n" * 2, "line 2: the table that begins at line 1 has no"),
        ("<!-- speed results/fixture.json -->\n", "line 1: is '<!-- speed results/fixture.json -->', expected"),
        ("<!-- speed: -->\n<!-- /speed -->", "line 1"),
        ("<!-- speed: results/missing.json -->\n<!-- /speed -->", "missing.json: cannot be read: No such file"),
        ("<!-- speed: README.md -->\n<!-- /speed -->", "README.md: is not JSON"),
        ("<!-- speed: results/fixture.json case=d99 -->\n<!-- /speed -->", "has no measured row"),
        ("<!-- speed: results/fixture.json colour=red -->\n<!-- /speed -->", "'colour=red', expected name=value"),
        ("<!-- speed: results/fixture.json case='d16 -->\n<!-- /speed -->", "line 1"),
        ("<!-- speed: results/fixture.json against=x -->\n<!-- /speed -->", "against is 'x', expected one of compile"),
    ],
)
def test_problems_are_one_line_and_write_nothing(readme, text, problem):
    readme.write_text(text)
    code, output = run(readme)
    assert code == 2
    assert output.startswith("error: ") and output.count("\n") == 1
    assert problem in output
    assert readme.read_text() == text


def test_missing_file_is_one_line(tmp_path):
    code, output = run(tmp_path / "README.md")
    assert code == 2 and "cannot be read: No such file" in output and output.count("\n") == 1


def test_report_of_another_kind_is_refused(readme):
    (readme.parent / "results" / "fixture.json").write_text('{"schema": "other"}')
    with pytest.raises(UserError, match="is not a report of bench/run.py"):
        fill(TEXT, readme)
