"""Both trainers and the export on tiny models: a resumed run ends bitwise where an uninterrupted one ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from var_fast.checkpoint import load_checkpoint
from var_fast.errors import UserError
from var_fast.training import export as export_module
from var_fast.training import tokenizer as tokenizer_module
from var_fast.training import transformer as transformer_module
from var_fast.training.cli import app
from var_fast.training.export import export_checkpoint
from var_fast.training.files import load_state, save_state
from var_fast.training.loop import Cadence
from var_fast.training.schedule import Limits
from var_fast.training.tokenizer import build_tokenizer, clip_gradients, load_trained_tokenizer, train_tokenizer
from var_fast.training.transformer import (
    TransformerSettings,
    load_trained_transformer,
    train_transformer,
    view_batches,
)

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


def test_training_lowers_the_loss(tokenizer_run, transformer_run):
    """Means of the first and the last two of 8 steps; the runs are deterministic.

    Trained: 0.68 and 0.95 times the first. Without optimizer steps the batches alone make them 1.01 and 1.00 times it.
    """
    for run, factor in ((tokenizer_run, 0.8), (transformer_run, 0.97)):
        lines = [json.loads(line) for line in run.with_name("log.jsonl").read_text().splitlines()]
        first, *_, last = (line["loss"] for line in lines if line["kind"] == "train")
        assert last < factor * first


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


def changed_copy(path, to, change):
    """A copy of a checkpoint after change(state)."""
    state = torch.load(path, weights_only=True)
    change(state)
    save_state(to, state)
    return to


def nudge(state):
    """Trains the tokenizer a little further, as it were."""
    state["job"]["ema"]["quantize.embedding.weight"][0, 0] += 1e-3


def test_transformer_knows_its_tokenizer_by_its_weights(
    tmp_path, emoji_folder, tokenizer_run, transformer_settings, transformer_run
):
    """At another path it is the same; with other weights it is not, in resuming and in exporting."""
    moved = changed_copy(tokenizer_run, tmp_path / "moved.pt", lambda state: None)
    other = changed_copy(tokenizer_run, tmp_path / "other.pt", nudge)
    shutil.copytree(transformer_run.parent, tmp_path / "run")

    def resume(tokenizer):
        settings = replace(transformer_settings, tokenizer=str(tokenizer))
        return train_transformer(emoji_folder, tmp_path / "run", Limits(steps=9), settings, cadence=QUIET)

    with pytest.raises(UserError, match="tokenizer: this run was trained on the tokens of other weights"):
        resume(other)
    with pytest.raises(UserError, match="tokenizer: .*checkpoint.pt was trained on the tokens of other weights"):
        export_checkpoint(other, transformer_run, tmp_path / "out", emoji_folder)
    assert resume(moved).step == 9
    best = tmp_path / "run" / "best.pt"
    changed_copy(best, best, lambda state: state.update(tokenizer_hash="0" * 64))
    vae, _ = load_trained_tokenizer(tokenizer_run)
    with pytest.raises(UserError, match="best.pt was trained on the tokens of other weights"):
        load_trained_transformer(tmp_path / "run" / "checkpoint.pt", vae, best=best)

    changed_copy(
        tmp_path / "run" / "checkpoint.pt",
        tmp_path / "run" / "checkpoint.pt",
        lambda state: state["job"].pop("tokenizer_hash"),
    )
    load_trained_transformer(tmp_path / "run" / "checkpoint.pt", load_trained_tokenizer(other)[0])  # it does not say


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("settings"),
        lambda state: state["settings"].update(unheard_of=1),
        lambda state: state["job"].pop("ema"),
        lambda state: state["job"]["ema"].popitem(),
    ],
)
def test_checkpoints_with_other_entries_are_user_errors(tmp_path, tokenizer_run, transformer_run, change):
    path = changed_copy(tokenizer_run, tmp_path / "checkpoint.pt", change)
    with pytest.raises(UserError, match="checkpoint.pt holds other entries"):
        load_trained_tokenizer(path)
    vae, _ = load_trained_tokenizer(tokenizer_run)
    path = changed_copy(transformer_run, tmp_path / "checkpoint.pt", change)
    with pytest.raises(UserError, match="checkpoint.pt holds other entries"):
        load_trained_transformer(path, vae)


def test_interrupted_export_leaves_no_older_metrics(
    tmp_path, monkeypatch, emoji_folder, tokenizer_run, transformer_run
):
    (tmp_path / "metrics.json").write_text("older")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "tokenise", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tokenizer_run, transformer_run, tmp_path, emoji_folder)
    assert (tmp_path / "config.json").exists() and not (tmp_path / "metrics.json").exists()


def test_wrong_size_is_refused_before_anything_is_read(tmp_path, tiny_tokenizer):
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


BAD_TOKENIZER = [
    ("steps", "0", "steps: got 0"),
    ("minutes", "nan", "minutes: got nan"),
    ("device", "meta", "'meta'"),
    ("ch", "48", "48 channels, expected a multiple of 32: choose ch"),
    ("ch", "0", "ch: got 0"),
    ("ch-mult", "0,1,1", "ch_mult: got (0, 1, 1)"),
    ("patch-nums", "4,2,8", "patch_nums: got (4, 2, 8), expected growing numbers"),
    ("patch-nums", "0,8", "patch_nums: got (0, 8)"),
    ("vocab-size", "0", "vocab_size: got 0"),
    ("z-channels", "-1", "z_channels: got -1"),
    ("batch", "0", "batch: got 0"),
    ("lr", "nan", "lr: got nan"),
    ("lr", "0", "lr: got 0.0"),
    ("l1", "-1", "l1: got -1.0"),
    ("vq", "inf", "vq: got inf"),
    ("zoom", "1.5", "zoom: got 1.5"),
    ("ema", "1", "ema: got 1.0"),
    ("revive-every", "-1", "revive_every: got -1"),
    ("save-every", "-1", "save_every_s: got -1.0"),
]
BAD_TRANSFORMER = [
    ("num-heads", "0", "num_heads: got 0"),
    ("depth", "0", "depth: got 0"),
    ("embed-dim", "0", "embed_dim: got 0"),
    ("batch", "0", "batch: got 0"),
    ("lr", "nan", "lr: got nan"),
    ("schedule", "step", "schedule: got 'step', expected one of cosine, linear"),
    ("views", "0", "views: got 0"),
    ("drop-rate", "1", "drop_rate: got 1.0"),
    ("drop-path", "-0.1", "drop_path_rate: got -0.1"),
    ("cond-drop", "2", "cond_drop_rate: got 2.0"),
    ("label-smoothing", "nan", "label_smoothing: got nan"),
    ("min-per-class", "0", "min_per_class: got 0"),
    ("skin-variants", "-1", "skin_variants: got -1"),
]


@pytest.mark.parametrize(
    "words, named",
    [
        (["tokenizer", "--steps", "1", "--data", "/nowhere"], "fetch_emoji"),
        (["tokenizer"], "steps, minutes"),
        (["tokenizer", "--steps", "1", "--patch-nums", "1,x"], "patch-nums: got '1,x'"),
        (["tokenizer", "--steps", "1", "--device", "abacus"], "abacus"),
        (["transformer", "--tokenizer", "/nowhere/checkpoint.pt", "--steps", "1"], "/nowhere/checkpoint.pt"),
        (["transformer", "--tokenizer", "x", "--steps", "1", "--num-heads", "3"], "embed_dim: got 256"),
        *((["tokenizer", "--steps", "1", f"--{name}", value], named) for name, value, named in BAD_TOKENIZER),
        *(
            (["transformer", "--tokenizer", "x", "--steps", "1", f"--{name}", value], named)
            for name, value, named in BAD_TRANSFORMER
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert named in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_diverging_run_stops_in_one_line_and_keeps_its_checkpoint(tmp_path, emoji_folder, tiny_tokenizer):
    train_tokenizer(emoji_folder, tmp_path, Limits(steps=2), tiny_tokenizer, cadence=QUIET)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    wild = replace(tiny_tokenizer, lr=1e30, warmup_steps=0)
    with pytest.raises(UserError, match="not finite any more|became nan|became inf"):
        train_tokenizer(emoji_folder, tmp_path / "wild", Limits(steps=40), wild, cadence=QUIET)
    assert not (tmp_path / "wild" / "checkpoint.pt").exists()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_gradient_that_is_not_finite_is_not_applied():
    model = torch.nn.Linear(1, 1)
    model.weight.grad, model.bias.grad = torch.full((1, 1), float("nan")), torch.zeros(1)
    with pytest.raises(UserError, match="gradient is not finite"):
        clip_gradients(model, 1.0)
    model.weight.grad.fill_(3.0)
    assert clip_gradients(model, 1.0) == 3.0
    torch.testing.assert_close(model.weight.grad, torch.ones(1, 1), atol=1e-5, rtol=0)
