"""var-fast evaluate: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli_util import SIZE, refused, run
from var_fast import VQVAE
from var_fast.evaluation.reconstruction import reconstruction_metrics
from var_fast.images import load_image

pytestmark = pytest.mark.usefixtures("one_thread")


def save_pictures(folder, count=5, side=SIZE, seed=0) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def evaluate(kind, *arguments) -> int:
    return run("evaluate", kind, *arguments, "--device", "cpu")


def test_reconstruction_of_a_folder(model, folder, capsys):
    save_pictures(folder / "pictures")
    (folder / "pictures" / "4.png").rename(folder / "pictures" / "valley.png")
    assert evaluate("reconstruction", "pictures", "--model", model, "--json", "r.json", "--batch", 2) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads((folder / "r.json").read_text())
    images = torch.stack([load_image(file) for file in sorted((folder / "pictures").iterdir())])
    expected = reconstruction_metrics(VQVAE.from_pretrained(model), [images])
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name  # SSIM may be near 0
    assert found["images"] == 5 and found["unreadable"] == 0
    assert f"PSNR      {expected['psnr_db']:.2f} dB" in out and f"SSIM      {expected['ssim']:.4f}" in out
    rows = [line.split() for line in out.splitlines() if " x " in line]
    percent, perplexity = expected["code_use_percent_per_scale"], expected["perplexity_per_scale"]
    assert len(rows) == 2
    for k, row in enumerate(rows):
        assert f"{percent[k]:.1f}" in row and f"{perplexity[k]:.1f}" in row and row.count(str(k + 1)) >= 2


def test_reconstruction_of_a_split(model, folder, capsys):
    save_pictures(folder / "data" / "train" / "a", 4, 9)
    save_pictures(folder / "data" / "val" / "a", 3, 9, seed=1)
    (folder / "data" / "val" / "a" / "bad.png").write_bytes(b"no picture")
    for options, count in (((), 3), (("--split", "train"), 4), (("--split", "train", "--limit", 2), 2)):
        assert evaluate("reconstruction", "data", "--model", model, "--json", "r.json", *options) == 0
        assert json.loads((folder / "r.json").read_text())["images"] == count
        out, err = capsys.readouterr()
        assert ("bad.png" in err and err.startswith("1 pictures cannot be read")) == (count == 3)


def test_reconstruction_refuses(model, folder, capsys):
    (folder / "empty").mkdir()
    save_pictures(folder / "data" / "train" / "a")
    own = ("--model", model)
    assert "holds no pictures" in refused(capsys, folder, "evaluate", "reconstruction", "empty", *own)
    assert "nowhere" in refused(capsys, folder, "evaluate", "reconstruction", "nowhere", *own)
    assert "expected --split train" in refused(capsys, folder, "evaluate", "reconstruction", "data", *own)
    words = refused(capsys, folder, "evaluate", "reconstruction", "data", "--split", "test", *own)
    assert "split is 'test', expected train or val" in words
    words = refused(capsys, folder, "evaluate", "reconstruction", "data", "--json", "no/r.json", *own)
    assert "there is no directory" in words
    words = refused(capsys, folder, "evaluate", "reconstruction", "data", "--split", "train", "--enlarge", 0.5, *own)
    assert "enlarge" in words


class Means(torch.nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3))


def test_fid(folder, capsys):
    torch.jit.script(Means()).save("means.pt")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (40, 4, 4, 3), dtype=np.uint8), rng.integers(50, 200, (30, 4, 4, 3), dtype=np.uint8)
    np.savez("a.npz", a)
    (folder / "b").mkdir()
    for i, picture in enumerate(b):
        Image.fromarray(picture).save(folder / "b" / f"{i}.png")
    x, y = a.astype(float).mean((1, 2)), b.astype(float).mean((1, 2))
    sa, sb = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(sa @ sb).real).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sa) + np.trace(sb) - 2 * root
    np.savez("b.npz", mu=y.mean(0), sigma=sb)
    np.savez("ready.npz", mu=x.mean(0), sigma=sa)
    options = ("--features", "means.pt", "--batch", 7)
    for pair in (
        ("a.npz", "b", *options),
        ("b", "a.npz", *options),
        ("a.npz", "b.npz", *options),
        ("ready.npz", "b.npz"),
    ):
        assert evaluate("fid", *pair, "--json", "f.json") == 0
        out, err = capsys.readouterr()
        assert out == f"FID {expected:.4f}\n" and err == ""
        assert json.loads((folder / "f.json").read_text())["fid"] == pytest.approx(expected, rel=1e-6)


def test_fid_refuses(folder, capsys):
    torch.jit.script(Means()).save("means.pt")
    np.savez("a.npz", np.zeros((3, 4, 4, 3), np.uint8))
    np.savez("one.npz", np.zeros((1, 4, 4, 3), np.uint8))
    np.savez("wide.npz", mu=np.zeros(4), sigma=np.eye(4))
    (folder / "no.npz").write_bytes(b"none")
    network = ("--features", "means.pt")
    assert "--features is not given" in refused(capsys, folder, "evaluate", "fid", "a.npz", "wide.npz")
    assert "no TorchScript" in refused(capsys, folder, "evaluate", "fid", "a.npz", "a.npz", "--features", "a.npz")
    assert "damaged or no .npz" in refused(capsys, folder, "evaluate", "fid", "a.npz", "no.npz", *network)
    assert "does not exist" in refused(capsys, folder, "evaluate", "fid", "a.npz", "nowhere", *network)
    assert "widths 3 and 4" in refused(capsys, folder, "evaluate", "fid", "a.npz", "wide.npz", *network)
    assert "at least two pictures" in refused(capsys, folder, "evaluate", "fid", "one.npz", "a.npz", *network)
    assert "json" in refused(capsys, folder, "evaluate", "fid", "a.npz", "a.npz", *network, "--json", "no/f.json")


def test_help_of_the_group(capsys):
    for arguments in (("evaluate", "--help"), ("evaluate",)):
        assert run(*arguments) == 0
        out, err = capsys.readouterr()
        assert "reconstruction" in out and "fid" in out and err == ""
    assert run("evaluate", "quality") == 2
    assert "quality" in capsys.readouterr().err
