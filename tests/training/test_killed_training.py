"""`var-fast train` killed with SIGKILL at any moment and started again: losses and weights of the uninterrupted run,
bitwise, on one rank and on two."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.data.pictures import write_folder
from var_fast.training.run_checkpoints import RunCheckpoints, read_facts, resolve

STEPS = 18
SMALL = "--no-tensorboard --batch 4 --log-every-steps 2 --save-every 0 --save-every-steps 3 --keep 2".split()
SHAPE = "--size 8 --ch 32 --ch-mult 1,1 --patch-nums 1,2,4 --vocab-size 24 --z-channels 4 --revive-every 5".split()
TOKENIZER = ["tokenizer", *SHAPE, "--kmeans-batches", "1", "--eval-every-steps", "8", *SMALL]
TRANSFORMER = "transformer --depth 2 --embed-dim 32 --num-heads 2 --drop-path 0.1 --eval-every-steps 8".split() + SMALL


def command(ranks: int, words: list[str]) -> list[str]:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    return [sys.executable, *launcher, "-m", "var_fast", "train", *map(str, words)]


def start(ranks: int, words: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command(ranks, words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finish(ranks: int, words: list[str]) -> str:
    process = start(ranks, words)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_when_further(process: subprocess.Popen, out: Path, steps: int, pause: float) -> None:
    """SIGKILL to all processes of the run, `pause` seconds after it has saved `steps` more steps than at its start."""
    began = latest(out)
    while process.poll() is None and latest(out) < began + steps:
        time.sleep(0.005)
    time.sleep(pause)
    assert process.poll() is None, process.communicate()[0]
    for pid in [*descendants(process.pid), process.pid]:  # torchrun's workers are in sessions of their own
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def descendants(pid: int) -> list[int]:
    children = [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if int(stat.read_text().rpartition(")")[2].split()[1]) == pid
    ]
    return children + [below for child in children for below in descendants(child)]


def latest(out: Path) -> int:
    found = RunCheckpoints(out / "checkpoints").latest()
    return 0 if found is None else int(found.name.removeprefix("step-"))


def numbers(out: Path) -> list[dict]:
    """The log without what the clock says."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("elapsed_s", "images_per_s")} for line in lines]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"), per_class=6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, images) -> Path:
    """Tokens of a tokenizer that was hardly trained."""
    folder = tmp_path_factory.mktemp("tokens")
    finish(1, [*TOKENIZER, "--data", images, "--out", folder / "run", "--steps", "2"])
    words = ["tokenize", images, folder / "cache", "--model", folder / "run", "--flips"]
    subprocess.run(
        [sys.executable, "-m", "var_fast", *map(str, words)], check=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    return folder / "cache"


MORE = pytest.mark.skipif(not os.environ.get("VAR_FAST_MORE_KILLS"), reason="VAR_FAST_MORE_KILLS=1 runs this one too")


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainer, ranks",
    [
        ("tokenizer", 1),
        ("transformer", 2),
        pytest.param("tokenizer", 2, marks=MORE),
        pytest.param("transformer", 1, marks=MORE),
    ],
)
def test_a_killed_run_goes_on_bitwise(tmp_path, images, cache, trainer, ranks):
    words = [*(TOKENIZER if trainer == "tokenizer" else TRANSFORMER), "--steps", STEPS]
    words += ["--data", images if trainer == "tokenizer" else cache]
    finish(ranks, [*words, "--out", tmp_path / "whole"])
    draw = random.Random(f"{trainer} {ranks}")
    cut = [*words, "--out", tmp_path / "cut"]
    for _ in range(2 if ranks == 1 else 1):
        kill_when_further(start(ranks, cut), tmp_path / "cut", draw.choice((3, 6)), draw.random() * 0.05)
    assert "resuming" in finish(ranks, cut)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    for kind in ("model", "best"):
        for name in ("tokenizer", "transformer"):
            file = f"{kind}/{name}.safetensors"
            if (tmp_path / "whole" / file).exists():
                ours, theirs = load_file(tmp_path / "cut" / file), load_file(tmp_path / "whole" / file)
                assert all(torch.equal(ours[entry], theirs[entry]) for entry in theirs)
    ours, theirs = (read_facts(resolve(tmp_path / name)) for name in ("cut", "whole"))
    assert {**ours, "elapsed_s": 0} == {**theirs, "elapsed_s": 0}


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(tmp_path, cache):
    words = [*TRANSFORMER, "--data", cache, "--out", tmp_path, "--steps", "100000", "--save-every-steps", "0"]
    process = start(1, words)
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_bytes():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by a signal at step" in output
    assert latest(tmp_path) >= 2
