"""sample, export-fid and evaluate on two real processes: the same files as one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli_util import SIZE, run

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
LAUNCH = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def torchrun(*arguments, code=0) -> subprocess.CompletedProcess:
    """The command on two processes, on CPUs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCH, "-m", "var_fast", *map(str, arguments), "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == (code == 0), done.stderr
    return done


def test_sample(model, folder):
    options = ("--model", model, "--labels", "0-2", "--seeds", "0-4", "--dtype", "float32", "--batch", 2)
    assert run("sample", *options, "--out", "one.png", "--save-dir", "one") == 0
    done = torchrun("sample", *options, "--out", "two.png", "--save-dir", "two")
    assert done.stdout.count("picture: ") == 1 and f"5 x {SIZE} x {SIZE} pixels" in done.stdout
    names = sorted(os.listdir("one"))
    assert sorted(os.listdir("two")) == names and len(names) == 5
    for a, b in (("one.png", "two.png"), *((f"one/{n}", f"two/{n}") for n in names)):
        assert Path(a).read_bytes() == Path(b).read_bytes()


def test_sample_steps_with_fewer_images_than_ranks(model, folder):
    options = ("--model", model, "--labels", 1, "--seeds", 5, "--dtype", "float32", "--steps")
    assert run("sample", *options, "--out", "one.png") == 0
    torchrun("sample", *options, "--out", "two.png")
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_export_fid(model, folder):
    options = ("--model", model, "--per-class", 70, "--dtype", "float32", "--batch", 8)  # 5 parts of 64 images
    assert run("export-fid", *options, "--out", "one.npz") == 0
    done = torchrun("export-fid", *options, "--out", "two.npz")
    assert done.stdout.count("file: ") == 1
    assert Path("one.npz").read_bytes() == Path("two.npz").read_bytes()
    assert not Path("two.npz.parts").exists()


def test_an_error_is_told_and_ends_all(model, folder):
    Path("two.npz").write_bytes(b"mine")
    done = torchrun("export-fid", "--model", model, "--per-class", 2, "--out", "two.npz", code=2)
    assert "exists and was not made with these settings" in done.stderr
    assert Path("two.npz").read_bytes() == b"mine"


def test_evaluate(model, folder):
    (folder / "pictures").mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / "pictures" / f"{i}.png")
    options = ("evaluate", "reconstruction", "pictures", "--model", model)
    assert run(*options, "--json", "one.json") == 0
    done = torchrun(*options, "--json", "two.json")
    assert done.stdout.count("PSNR") == 1
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert one.keys() == two.keys() and one["images"] == 5
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-6), name
