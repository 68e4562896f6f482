"""`var-fast train`, from a folder of images to samples, and what it refuses before work is lost."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from tests.cli_util import refused, run
from tests.training.data.pictures import CLASSES, write_folder
from var_fast.checkpoint import load_checkpoint, save_checkpoint

SHAPE = "--size 8 --ch 32 --ch-mult 1,1 --patch-nums 1,2,4 --vocab-size 24 --z-channels 4 --kmeans-batches 1".split()
RUN = "--batch 4 --log-every-steps 2 --no-tensorboard --device cpu".split()
SMALL = "--depth 1 --embed-dim 32 --num-heads 2".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The four commands of docs/training.md, with tiny models."""
    root = tmp_path_factory.mktemp("made")
    images = write_folder(root / "images", per_class=6)
    torch.manual_seed(0)
    for words in (
        ["train", "tokenizer", "--data", images, "--out", root / "tokenizer", "--steps", 4, *SHAPE, *RUN],
        ["tokenize", images, root / "tokens", "--model", root / "tokenizer", "--flips"],
        ["train", "transformer", "--data", root / "tokens", "--out", root / "transformer", "--epochs", 1, *SMALL, *RUN],
        [
            "sample",
            "--model",
            root / "transformer",
            "--labels",
            "cat,dog",
            "--seeds",
            "0-3",
            "--out",
            root / "grid.png",
        ],
    ):
        assert run(*words) == 0
    return root


def test_from_a_folder_of_images_to_samples(made):
    grid = Image.open(made / "grid.png")
    assert grid.text["label"] == "1,2,1,2" and json.loads(grid.text["options"])["dtype"]
    vae, var, classes, config = load_checkpoint(made / "transformer" / "model")
    assert classes == CLASSES and config["image_size"] == 8 and var.depth == 1
    lines = [json.loads(line) for line in (made / "transformer" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["kind"] == "eval" and lines[-1]["step"] == 5 and lines[-1]["images"] == 6
    assert len(lines[0]["loss_per_scale"]) == 3
    lines = [json.loads(line) for line in (made / "tokenizer" / "log.jsonl").read_text().splitlines()]
    assert {"val_psnr_db", "val_ssim", "val_perplexity_per_scale", "val_code_use_percent_per_scale"} <= lines[-1].keys()
    for kind in ("tokenizer", "transformer"):
        assert list((made / kind / "samples").glob("step-*.png"))


def test_export_halves_the_weights(made, tmp_path, monkeypatch):
    for options, source in (([], "model"), (["--best"], "best")):
        out = tmp_path / source
        assert run("train", "export", made / "transformer", out, *options) == 0
        ours, theirs = load_checkpoint(out).var, load_checkpoint(made / "transformer" / source).var
        assert torch.equal(ours.head.weight, theirs.head.weight.bfloat16().float())
        half, full = (
            (folder / "transformer.safetensors").stat().st_size for folder in (out, made / "transformer" / source)
        )
        assert half < 0.6 * full


def test_training_from_images_encodes_them(made, tmp_path):
    words = ["train", "transformer", "--data", made / "images", "--tokenizer", made / "tokenizer", *SMALL, *RUN]
    assert run(*words, "--out", tmp_path / "run", "--steps", 2, "--flip", "--workers", 1) == 0
    assert load_checkpoint(tmp_path / "run" / "model").classes == CLASSES


@pytest.mark.parametrize("lacks", [True, False])
def test_a_type_that_this_cpu_is_slow_in_is_told(made, tmp_path, capsys, monkeypatch, lacks):
    monkeypatch.setattr("var_fast.training.cli.lacks_products", lambda name, device: lacks and name == "bfloat16")
    common = ("--precision", "bfloat16", "--steps", 1, *RUN)
    capsys.readouterr()
    assert run("train", "transformer", "--data", made / "tokens", "--out", tmp_path / "a", *SMALL, *common) == 0
    assert run("train", "tokenizer", "--data", made / "images", "--out", tmp_path / "b", *SHAPE, *common) == 0
    assert capsys.readouterr().out.count("warning: precision bfloat16: this CPU has no products of it") == 2 * lacks


def test_what_is_refused(made, tmp_path, capsys):
    def says(*words):
        return refused(capsys, tmp_path, "train", *words)

    tokens, images = ("--data", made / "tokens"), ("--data", made / "images")
    assert "tokenizer: got none, expected one beside images" in says("transformer", *images, "--steps", 1)
    words = says("transformer", *tokens, "--tokenizer", "demo", "--steps", 1)
    assert "was made by another tokenizer" in words and "expected one tokenizer" in words
    words = says("transformer", *tokens, "--preset", "d16")
    assert (
        "preset: d16 is for a tokenizer with patch_nums (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), this one has (1, 2, 4)"
        in words
    )
    assert "val_images: got 0, expected 1 or more" in says("tokenizer", *images, "--steps", 1, "--val-images", 0)
    assert "threads: got 0" in says("tokenizer", *images, "--steps", 1, "--threads", 0)
    assert "expected a multiple of 1 (ranks) times 3 (parts)" in says(
        "transformer", *tokens, *SMALL, "--steps", 1, "--passes", 3
    )
    assert "run: " in says("export", tmp_path, tmp_path / "out")

    vae, var, _, _ = load_checkpoint(made / "transformer" / "model")
    bigger = type(var)(vae, num_classes=5, depth=1, embed_dim=32, num_heads=2, patch_nums=(1, 2, 4), attn_l2_norm=True)
    save_checkpoint(tmp_path / "five", vae, bigger)
    words = says("transformer", *tokens, *SMALL, *RUN, "--steps", 1, "--init-from", tmp_path / "five")
    assert "five has 5 classes, the data has 3" in words


def test_a_run_is_not_gone_on_with_other_data(made, tmp_path, capsys):
    def says(*words):
        capsys.readouterr()
        assert run("train", *words) == 2
        return capsys.readouterr().err

    out = ("--out", tmp_path / "run", *SMALL, *RUN)
    assert run("train", "transformer", "--data", made / "tokens", "--steps", 2, *out) == 0
    assert run("tokenize", made / "images", tmp_path / "others", "--model", made / "tokenizer", "--crops", 2) == 0
    assert "use the data it began with" in says("transformer", "--data", tmp_path / "others", "--steps", 3, *out)
    assert run("train", "transformer", "--data", made / "tokens", "--steps", 3, *out) == 0
    write_folder(tmp_path / "four", per_class=4)
    words = ("tokenizer", "--data", tmp_path / "four", "--out", made / "tokenizer", "--steps", 5, *SHAPE, *RUN)
    assert "use the data it began with" in says(*words)
