"""Both trainers and the export on tiny models: a resumed run ends bitwise where an uninterrupted one ends."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from typer.testing import CliRunner

from var_fast.checkpoint import load_checkpoint
from var_fast.errors import UserError
from var_fast.training import tokenizer as tokenizer_module
from var_fast.training import transformer as transformer_module
from var_fast.training.cli import app
from var_fast.training.export import export_checkpoint
from var_fast.training.files import load_state
from var_fast.training.loop import Cadence
from var_fast.training.schedule import Limits
from var_fast.training.tokenizer import build_tokenizer, load_trained_tokenizer, train_tokenizer
from var_fast.training.transformer import TransformerSettings, train_transformer, view_batches

QUIET = Cadence(save_every_s=0, save_every_steps=0, eval_every_s=0, log_every_steps=2)


def assert_same(a, b, path="state"):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def stop_after(monkeypatch, job_class, step):
    """Let the process get SIGTERM while step number `step` is running."""
    real = job_class.step

    def with_signal(self, number, progress):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, number, progress)

    monkeypatch.setattr(job_class, "step", with_signal)


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory, emoji_folder, tiny_tokenizer):
    """checkpoint.pt of an uninterrupted tokenizer run of 8 steps."""
    out = tmp_path_factory.mktemp("tokenizer")
    assert train_tokenizer(emoji_folder, out, Limits(steps=8), tiny_tokenizer, cadence=QUIET).finished
    return out / "checkpoint.pt"


@pytest.fixture(scope="module")
def transformer_settings(tokenizer_run):
    return TransformerSettings(
        depth=2,
        embed_dim=32,
        num_heads=2,
        drop_path_rate=0.1,
        batch=4,
        warmup_steps=2,
        lr=3e-3,
        views=3,
        tokenizer=str(tokenizer_run),
        seed=5,
    )


@pytest.fixture(scope="module")
def transformer_run(tmp_path_factory, emoji_folder, transformer_settings):
    """checkpoint.pt of an uninterrupted transformer run of 8 steps."""
    out = tmp_path_factory.mktemp("transformer")
    assert train_transformer(emoji_folder, out, Limits(steps=8), transformer_settings, cadence=QUIET).finished
    return out / "checkpoint.pt"


def test_resumed_tokenizer_run_is_bitwise_the_uninterrupted_one(
    tmp_path, monkeypatch, emoji_folder, tiny_tokenizer, tokenizer_run
):
    with monkeypatch.context() as patch:
        stop_after(patch, tokenizer_module.TokenizerJob, 4)
        outcome = train_tokenizer(emoji_folder, tmp_path, Limits(steps=8), tiny_tokenizer, cadence=QUIET)
    assert not outcome.finished and outcome.step == 5
    assert train_tokenizer(emoji_folder, tmp_path, Limits(steps=8), tiny_tokenizer, cadence=QUIET).step == 8
    ours, whole = (load_state(p, "tokenizer")["job"] for p in (tmp_path / "checkpoint.pt", tokenizer_run))
    assert_same(ours, whole)


def test_resumed_transformer_run_is_bitwise_the_uninterrupted_one(
    tmp_path, monkeypatch, emoji_folder, transformer_settings, transformer_run
):
    with monkeypatch.context() as patch:
        stop_after(patch, transformer_module.TransformerJob, 4)
        outcome = train_transformer(emoji_folder, tmp_path, Limits(steps=8), transformer_settings, cadence=QUIET)
    assert not outcome.finished and outcome.step == 5
    assert train_transformer(emoji_folder, tmp_path, Limits(steps=8), transformer_settings, cadence=QUIET).step == 8
    ours, whole = (load_state(p, "transformer")["job"] for p in (tmp_path / "checkpoint.pt", transformer_run))
    assert_same(ours, whole)


def test_training_lowers_the_loss(tmp_path, emoji_folder, tiny_tokenizer, transformer_settings):
    """Means of the first and the last ten of 40 steps; the runs are deterministic."""

    def losses(out):
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["kind"] == "train"]

    cadence = Cadence(save_every_s=0, save_every_steps=0, eval_every_s=0, log_every_steps=10)
    train_tokenizer(emoji_folder, tmp_path / "a", Limits(steps=40), tiny_tokenizer, cadence=cadence)
    first, *_, last = losses(tmp_path / "a")
    assert last < 0.7 * first
    train_transformer(emoji_folder, tmp_path / "b", Limits(steps=40), transformer_settings, cadence=cadence)
    first, *_, last = losses(tmp_path / "b")
    assert last < 0.9 * first


def test_codes_are_revived_in_training(tmp_path, emoji_folder, tiny_tokenizer, monkeypatch):
    moved = []
    real = tokenizer_module.revive_codes
    monkeypatch.setattr(tokenizer_module, "revive_codes", lambda *a, **k: moved.append(real(*a, **k)) or moved[-1])
    train_tokenizer(emoji_folder, tmp_path, Limits(steps=10), tiny_tokenizer, cadence=QUIET)
    assert moved[0] == tiny_tokenizer.vocab_size  # the data-made start
    # Windows of 3 steps end at steps 3, 6 (progress 0.2, 0.5), 9 (progress 0.8: too late).
    assert len(moved) == 3


def test_trained_tokenizer_is_the_averaged_one_and_frozen(tokenizer_run):
    vae, settings = load_trained_tokenizer(tokenizer_run)
    state = load_state(tokenizer_run, "tokenizer")["job"]
    assert_same(dict(vae.state_dict()), dict(state["ema"]))
    assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in state["ema"])
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert settings.patch_nums == (1, 2, 4)


def test_views_are_plain_then_mirrored_then_moved():
    img = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    larger = img.repeat_interleave(2, 2).repeat_interleave(2, 3)
    plain, mirrored, moved, again = (
        torch.cat(list(view_batches(img, larger, view, True, seed=0, batch=2))) for view in (0, 1, 2, 2)
    )
    assert torch.equal(mirrored, plain.flip(-1))
    assert torch.equal(moved, again) and not torch.equal(moved, plain)
    unflipped = torch.cat(list(view_batches(img, larger, 1, False, seed=0)))
    assert not torch.equal(unflipped, plain) and not torch.equal(unflipped, mirrored)


def test_export_writes_what_load_checkpoint_reads(tmp_path, emoji_folder, tokenizer_run, transformer_run):
    metrics = export_checkpoint(tokenizer_run, transformer_run, tmp_path, emoji_folder, best=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "metrics.json",
        "tokenizer.safetensors",
        "transformer.safetensors",
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["classes"] == ["animal", "shape"] and config["image_size"] == 16
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert len(metrics["transformer"]["held_out"]["loss"]) == 3
    assert metrics["transformer"]["held_out"]["loss"][0] > 0
    assert 0 < metrics["tokenizer"]["train"]["code_use_percent"] <= 100
    assert load_checkpoint(tmp_path) is not None


def test_wrong_size_is_refused_before_anything_is_read(tmp_path, tiny_tokenizer):
    from dataclasses import replace

    with pytest.raises(UserError, match=r"size: got 20, expected 4 \* 4 = 16"):
        build_tokenizer(replace(tiny_tokenizer, size=20), test_mode=True)


def test_command_line_trains_resumes_and_exports(tmp_path, emoji_folder):
    def run(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    small = ["--size", 16, "--ch-mult", "1,1,1", "--patch-nums", "1,2,4", "--vocab-size", 24, "--z-channels", 4]
    tokenizer = ["tokenizer", "--data", emoji_folder, "--out", tmp_path / "t", "--batch", 4, *small]
    assert run(*tokenizer, "--steps", 2).exit_code == 0
    resumed = run(*tokenizer, "--steps", 3)
    assert resumed.exit_code == 0 and "at step 2" in resumed.output
    checkpoint = tmp_path / "t" / "checkpoint.pt"
    transformer = ["transformer", "--tokenizer", checkpoint, "--data", emoji_folder, "--out", tmp_path / "v"]
    shape = ["--depth", 1, "--embed-dim", 32, "--num-heads", 2, "--views", 1]
    assert run(*transformer, "--steps", 2, *shape).exit_code == 0
    runs = ["--tokenizer", checkpoint, "--transformer", tmp_path / "v" / "checkpoint.pt"]
    done = run("export", *runs, "--out", tmp_path / "demo", "--data", emoji_folder)
    assert done.exit_code == 0 and (tmp_path / "demo" / "config.json").is_file()


@pytest.mark.parametrize(
    "words, named",
    [
        (["tokenizer", "--steps", "1", "--data", "/nowhere"], "fetch_emoji"),
        (["tokenizer"], "steps, minutes"),
        (["tokenizer", "--steps", "1", "--patch-nums", "1,x"], "patch-nums: got '1,x'"),
        (["tokenizer", "--steps", "1", "--device", "abacus"], "abacus"),
        (["transformer", "--tokenizer", "/nowhere/checkpoint.pt", "--steps", "1"], "/nowhere/checkpoint.pt"),
        (["transformer", "--tokenizer", "x", "--steps", "1", "--num-heads", "3"], "embed_dim: got 256"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert named in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
