"""bench/run.py as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.rows import Report
from bench.run import _command, main

ROOT = Path(__file__).parents[2]
SHORT = ["--suite", "sample", "--models", "demo", "--batch", "1", "--rounds", "2", "--seconds", "0", "--device", "cpu"]
SHORT += ["--dtype", "float32"]  # elsewhere it depends on the machine which there are


def command(*arguments):
    return [sys.executable, str(ROOT / "bench" / "run.py"), *map(str, arguments)]


def run(*arguments, cwd=ROOT):
    # a directory that is not the repository, and no path to it: as a new user would
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "120"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


@pytest.mark.slow
def test_a_short_report_has_all_its_files(tmp_path):
    done = run(*SHORT, "--out", tmp_path / "out", "--json", tmp_path / "again.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = Report.read(tmp_path / "out" / "report.json")
    rows = {row.implementation: row for row in report.rows}
    assert set(rows) == {"reference", "var_fast"}
    assert all(row.median_s > 0 and row.floor_s > 0 and row.samples >= 2 for row in rows.values())
    assert rows["var_fast"].ratio["reference"] > 0
    assert [row["mode"] for row in report.quality] == ["var_fast"] * len(report.quality) and report.quality
    assert report.quality[0]["token_agreement"] == 1.0
    assert report.timeline["totals_s"]["matrix products"] > 0
    assert report.seconds["total"] > report.seconds["timed"] > 0
    assert not report.interrupted
    assert json.loads((tmp_path / "again.json").read_text())["rows"] == [vars(row) for row in report.rows]
    assert "var_fast" in done.stdout and "report.md" in done.stdout
    markdown = (tmp_path / "out" / "report.md").read_text()
    for plot in (tmp_path / "out").glob("*.png"):
        assert plot.name in markdown
    assert str(tmp_path) not in markdown  # a report goes to others: no paths of this machine
    old = run(*SHORT, "--out", tmp_path / "new", "--compare", tmp_path / "again.json")
    assert old.returncode == 0 and "2 rows in both" in " ".join(old.stdout.split()), old.stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_writes_what_is_finished(tmp_path, how):
    arguments = [*SHORT, "--batch", "1,2,4096", "--seconds", "1"]
    process = subprocess.Popen(
        command(*arguments, "--out", tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background of a shell
    )
    file = tmp_path / "report.json"
    deadline = time.monotonic() + 120
    try:
        while not (file.exists() and len(json.loads(file.read_text())["rows"]) >= 2):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(how)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.decode().strip().endswith("interrupted")
    report = Report.read(file)
    assert report.interrupted and report.rows[0].median_s > 0
    assert "interrupted" in (tmp_path / "report.md").read_text().lower()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--models", "d17"], "--models holds 'd17'"),
        (["--models", "d16,"], "--models holds ''"),
        (["--peer", "fastvar"], "--peer is 'fastvar', expected one of compile, flex"),
        (["--peer", "published"], "--peer published needs a path"),
        (["--peer", "published=/nowhere/VAR"], "--peer published=/nowhere/VAR: there is no such path"),
        (["--peer", f"published={ROOT / 'bench'}"], "expected a checkout of the public VAR code"),
        (["--peer", f"hmar={ROOT / 'bench'}"], "expected"),
        (["--peer", "sdpa=x"], "--peer sdpa takes no path"),
        (["--suite", "all,x"], "--suite holds"),
        (["--batch", "0"], "--batch holds '0'"),
        (["--dtype", "int8"], "--dtype holds 'int8'"),
        (["--device", "cuda:99"], "--device is 'cuda:99'"),
        (["--compare", "/nowhere.json"], "/nowhere.json: cannot be read"),
        (["--json", "/nowhere/x.json"], "/nowhere/x.json"),
        (["--out", "/proc/nowhere"], "--out is '/proc/nowhere'"),
        (["--vae-ckpt", "x.pth"], "--vae-ckpt and --var-ckpt go with one published model"),
        (["--rounds", "1"], "--rounds"),
        (["--suite", "sample", "--only", "qk_norm"], "--only chooses among operators"),
        (["--only", "qk_nrom"], "--only is 'qk_nrom'"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == "" and len(errors.strip().splitlines()) == 1, errors
    assert words in errors
    assert not list(tmp_path.iterdir())


def test_the_script_ends_with_the_code_of_bad_input(tmp_path):
    done = run("--models", "d17", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --models holds 'd17'") and len(done.stderr.splitlines()) == 1


def test_help_explains_the_options(capsys):
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    for word in ("--suite", "--models", "--peer", "--quick", "--compare", "published=PATH"):
        assert word in output


def test_the_command_names_what_the_environment_sets(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench/run.py", "--quick"])
    assert _command() == "python bench/run.py --quick"
    monkeypatch.setenv("VAR_FAST_ONE_LAUNCH_ROWS", "512")
    assert _command() == "VAR_FAST_ONE_LAUNCH_ROWS=512 python bench/run.py --quick"
