"""var-fast export-fid: the file, what is printed, going on after an interruption, bad input."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.cli_util import SIZE, read, refused, run
from var_fast.evaluation import export_fid as exporting

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = ("--per-class", 3, "--cfg", 2, "--top-k", 8, "--top-p", 0.9, "--dtype", "float32", "--device", "cpu")


def export(model, *arguments) -> int:
    return run("export-fid", "--model", model, *OPTIONS, *arguments)


def test_writes_the_file_and_says_so(model, folder, capsys):
    assert export(model, "--seed", 0) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"12 x {SIZE} x {SIZE} pixels, 3 of each class, float32 on cpu" in out
    assert f"file: {folder / 'samples.npz'}" in out and "already" not in out
    images = np.load("samples.npz", allow_pickle=False)["arr_0"]
    assert images.shape == (12, SIZE, SIZE, 3)
    # image 7 is of class 2, and with seed 0 the one that `sample` makes of seed 7
    sampler = ("--labels", 2, "--seeds", 7, "--cfg", 2, "--top-k", 8, "--top-p", 0.9, "--dtype", "float32")
    assert run("sample", "--model", model, *sampler, "--save-dir", "one") == 0
    (file,) = Path("one").iterdir()
    picture, _ = read(file)
    np.testing.assert_array_equal(images[7], picture.mul(255).round().byte().permute(1, 2, 0).numpy())
    before = Path("samples.npz").stat().st_mtime_ns
    capsys.readouterr()
    assert export(model, "--seed", 0) == 0, "again: nothing to do"
    assert "12 were there already" in capsys.readouterr().out
    assert Path("samples.npz").stat().st_mtime_ns == before


def test_an_interruption_says_how_to_go_on(model, folder, capsys, monkeypatch):
    assert export(model, "--out", "whole.npz", "--batch", 2) == 0
    monkeypatch.setattr(exporting, "PART_IMAGES", 2)
    sample, calls = exporting._sample, 0

    def stop(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*arguments)

    monkeypatch.setattr(exporting, "_sample", stop)
    handler = signal.getsignal(signal.SIGTERM)
    capsys.readouterr()
    assert export(model, "--out", "a.npz", "--batch", 2) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "interrupted: 6 of 12 images are in a.npz.parts; the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not Path("a.npz").exists()
    assert export(model, "--out", "a.npz") == 0, "the batch is that of the parts"
    assert "6 were there already" in capsys.readouterr().out
    assert Path("a.npz").read_bytes() == Path("whole.npz").read_bytes()


@pytest.mark.parametrize("count", [1, 2])
def test_killed_and_resumed(model, folder, capsys, count):
    """One of `count` real processes is killed in the middle; one process goes on."""
    command = ["export-fid", "--model", str(model), *map(str, OPTIONS), "--per-class", "250", "--batch", "1"]
    processes = start([*command, "--out", "a.npz"], count)
    parts, deadline = Path("a.npz.parts"), time.monotonic() + 300
    while len(list(parts.glob("part-*.npz"))) < 3:
        assert processes[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    processes[-1].kill()
    told = [process.communicate(timeout=60)[1] for process in processes]
    assert processes[-1].returncode == -signal.SIGKILL
    if count == 2:
        assert processes[0].returncode == 2, told[0]
        assert told[0].startswith("error: another process of this run has ended") and told[0].count("\n") == 1
        assert "the parts stay in a.npz.parts, the same command goes on" in told[0]
    assert not Path("a.npz").exists()
    assert run(*command, "--out", "a.npz") == 0
    assert "were there already" in capsys.readouterr().out
    assert not parts.exists()
    assert run(*command, "--out", "b.npz") == 0
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()


def start(command: list[str], count: int) -> list[subprocess.Popen]:
    """The command in `count` processes that torchrun's environment makes one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"PYTHONPATH": os.path.dirname(os.path.dirname(__file__)), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "var_fast", *command],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def test_bad_input(model, folder, capsys):
    def words(*arguments):
        return refused(capsys, folder, "export-fid", "--model", model, *OPTIONS, *arguments)

    assert "expected a name that ends in .npz" in words("--out", "a.png")
    assert "no directory" in words("--out", "no/a.npz")
    assert "seed is -1" in words("--seed", -1)
    assert "cfg" in words("--cfg", "nan")
    assert "--per-class" in words("--per-class", 0)
    assert "--device" in words("--device", "abacus")
    assert "unknown" in refused(capsys, folder, "export-fid", "--model", "nothing")
    (folder / "a.npz").write_bytes(b"mine")
    assert "exists and was not made with these settings" in words("--out", "a.npz")
    assert export(model, "--out", "a.npz", "--restart") == 0
