"""var-fast tokenize: the cache it writes, what it prints, and bad input in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_util import refused, run
from tests.training.data.pictures import picture, write_folder
from tests.training.token_cache_util import files, tiny_vae
from var_fast.checkpoint import save_checkpoint
from var_fast.cli_models import model_folder
from var_fast.training.token_cache import TokenCache


@pytest.fixture
def data(tmp_path) -> Path:
    """15 pictures to train on, one of them corrupt, and 6 others; and RUN, which trained a tokenizer for 8 px."""
    save_checkpoint(tmp_path / "RUN/model", tiny_vae())
    root = write_folder(tmp_path / "data")
    (root / "train/cat/deeper/02.png").write_bytes(b"no picture")
    return root


def test_writes_a_cache_and_says_what_is_in_it(data, folder, capsys):
    arguments = ["tokenize", data, "cache", "--model", "RUN", "--crops", 2, "--flips", "--workers", 1]
    assert run(*arguments, "--size", 8, "--batch", 16) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "images:    14 of train, 6 of val"
    assert out[1] == f"skipped:   1 that cannot be read, named in index.json: {data}/train/cat/deeper/02.png, ..."
    assert out[2].startswith("sequences: 62, 0.0 MB") and "images/s" in out[3]
    assert out[4] == f"cache:     {folder}/cache"
    opened = TokenCache.open("cache")
    assert (opened.views, len(opened.split("train")), len(opened.split("val"))) == (4, 14, 6)
    before = files(folder / "cache")
    assert run(*arguments, "--batch", 16) == 0
    assert "nothing was left to do" in capsys.readouterr().out and files(folder / "cache") == before
    assert run(*arguments, "--batch", 16, "--enlarge", 1.5, "--seed", 3, "--shard-images", 7, "--restart") == 0
    index = json.loads((folder / "cache/index.json").read_text())
    assert (index["enlarge"], index["seed"], index["shard_images"], index["batch"]) == (1.5, 3, 7, 16)


@pytest.mark.slow
def test_shares_of_two_processes(data, folder):
    launcher = "-m torch.distributed.run --nproc_per_node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0".split()
    options = [
        "tokenize",
        str(data),
        "two",
        "--model",
        "RUN",
        "--shard-images",
        "4",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "var_fast", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images:    14 of train, 6 of val") == 1 and "in one of 2 processes" in done.stdout
    options[2] = "one"
    assert run(*options) == 0
    assert files(folder / "two") == files(folder / "one")


def test_bad_input_is_one_line(data, folder, capsys):
    def words(*arguments):
        return refused(capsys, folder, "tokenize", *arguments)

    assert "--size is 16, expected 8" in words(data, "cache", "--model", "RUN", "--size", 16)
    assert "nowhere does not exist" in words("nowhere", "cache", "--model", "RUN")
    assert "holds no training images" in words("RUN", "cache", "--model", "RUN")
    assert "model 'none' is unknown" in words(data, "cache", "--model", "none")
    assert "d16' needs its file" in words(data, "cache", "--model", "d16")
    assert "holds no token cache, expected a new or empty folder" in words(data, data, "--model", "RUN")
    assert "enlarge: got 0.5" in words(data, "cache", "--model", "RUN", "--enlarge", 0.5)
    assert "--device is 'abacus'" in words(data, "cache", "--model", "RUN", "--device", "abacus")
    assert "--crops" in words(data, "cache", "--model", "RUN", "--crops", 0)
    (folder / "shard.tar").write_bytes(b"cut off")
    assert "shard.tar is no whole, uncompressed tar archive" in words("shard.tar", "cache", "--model", "RUN")


def test_a_run_stands_for_its_model(data, folder, capsys):
    assert model_folder("RUN") == Path("RUN/model")
    assert model_folder(Path("RUN/model")) == Path("RUN/model")
    assert model_folder("data") == Path("data")
    picture(0, 8, 8).save("a.png")
    assert run("reconstruct", "a.png", "--model", "RUN", "--out", "r.png") == 0
    assert "dB" in capsys.readouterr().out
    assert "is a tokenizer only" in refused(capsys, folder, "sample", "--model", "RUN")
