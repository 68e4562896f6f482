"""The transformer's job: gradients, ranks, passes, resuming, progressive training, number types, recipes."""

from __future__ import annotations

import math
from functools import partial, partialmethod

import pytest
import torch

from tests.training.transformer_job_util import (
    PATCH_NUMS,
    L,
    RandomTokens,
    assert_close,
    job_of,
    train,
    weights,
)
from tests.two_ranks import on_two_ranks
from var_fast.checkpoint import load_checkpoint, save_checkpoint
from var_fast.errors import UserError
from var_fast.models import VQVAE
from var_fast.training.ranks import Ranks
from var_fast.training.recipes import TRANSFORMER_PRESETS
from var_fast.training.transformer import TeacherForcing, teacher_input
from var_fast.training.transformer_settings import TransformerSettings, build_transformer


def test_a_step_is_the_models_loss_and_adamw():
    """Against VAR.loss, clip_grad_norm_ and AdamW called by hand, in the same order: bitwise."""
    job = job_of(cond_drop=0.0, clip=0.5)
    by_hand = build_transformer(job.settings, job.vae, 3)
    by_hand.load_state_dict(job.var.state_dict())
    by_hand.train().cond_drop_rate = 0.0
    (values,) = train(job, 5, 6)
    batch = RandomTokens().stack(range(40, 48))
    x_BLC, tokens_BL = teacher_input(job.vae, batch.tokens_BL, 3)
    torch.manual_seed(5)
    loss, loss_k, accuracy_k = by_hand.loss(batch.label_B, x_BLC, tokens_BL)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
    assert values["loss"] == loss and values["grad_norm"] == norm
    assert torch.equal(values["loss_per_scale"], loss_k)
    assert torch.equal(values["accuracy_percent_per_scale"], 100 * accuracy_k)
    assert values["loss_tail"] == loss_k[-1]
    for mine, theirs in zip(job.gradients[0], by_hand.parameters()):
        assert torch.equal(mine, theirs.grad)
    lr = 0.2 * 8 / 256 * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (5 / 19 - 0.1) / 0.9)))
    assert float(values["lr"]) == pytest.approx(lr, rel=1e-6)
    groups = [[p for n, p in by_hand.named_parameters() if (p.ndim < 2 or _bare(n)) == bare] for bare in (False, True)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.05}, {"params": groups[1], "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    optimizer.step()
    assert_close(dict(job.var.state_dict()), dict(by_hand.state_dict()), 1e-6)


def _bare(name):
    return any(word in name for word in ("pos_", "lvl_embed", "ada_gss", "scale_mul", "bias"))


def test_passes_give_the_gradients_of_the_whole_batch():
    whole, divided = job_of(), job_of(passes=4)
    train(whole, 0, 2)
    train(divided, 0, 2)
    assert_close(dict(enumerate(divided.gradients[0])), dict(enumerate(whole.gradients[0])), 1e-6)


def _as_one_rank(ranks: Ranks) -> None:
    alone = job_of()
    train(alone, 0, 3)
    gradients, expected = alone.gradients[0], [weights(alone), alone.evaluate()]
    train(alone, 3, 4)
    expected.append(alone.evaluate())
    for changes in ({"parallel": "ddp"}, {"parallel": "fsdp"}, {"parallel": "fsdp", "passes": 2}):
        job = job_of(ranks, **changes)
        train(job, 0, 3)
        assert_close(dict(enumerate(job.gradients[0])), dict(enumerate(gradients)), 1e-6)
        assert_close(weights(job), expected[0], 1e-5)
        found = job.evaluate()
        train(job, 3, 4)  # the average moves on, and evaluation sees it
        train_again = job.evaluate()
        assert train_again["held_out_loss"] == pytest.approx(expected[2]["held_out_loss"], rel=1e-6)
        assert found["images"] == 131
        for name in ("held_out_loss", "held_out_accuracy_percent"):
            assert found[name] == pytest.approx(expected[1][name], rel=1e-6)
        job.var.eval()
        assert job._hidden(7, 0, 4).tolist() == alone._hidden(7, 0, 8).tolist()[4 * ranks.rank :][:4]


def _save_models(folder, ranks: Ranks) -> None:
    for parallel in ("ddp", "fsdp"):
        job = job_of(ranks, parallel=parallel)
        train(job, 0, 2)
        write = job.model_writer()
        assert (write is not None) == ranks.is_main
        if ranks.is_main:
            write(folder / parallel)
        job.draw_samples(folder / f"{parallel}.png", 2)
        job.step(2, 0.1, next(job.batches(2)))  # and training goes on


def test_two_ranks_give_what_one_gives_with_the_whole_batch(tmp_path):
    """DDP and FSDP2 on gloo against one rank with the same batch: gradients to 1e-6, weights after three steps of
    AdamW, which divides by their size, to 1e-5. Sharded weights are saved as whole ones."""
    on_two_ranks(_as_one_rank, partial(_save_models, tmp_path))
    ddp, fsdp = (load_checkpoint(tmp_path / name) for name in ("ddp", "fsdp"))
    assert_close(dict(fsdp.var.state_dict()), dict(ddp.var.state_dict()), 1e-5)
    assert ddp.classes == fsdp.classes == ["a", "b", "c"]
    assert (tmp_path / "ddp.png").stat().st_size > 100 and (tmp_path / "fsdp.png").stat().st_size > 100


def copy_into(job, tensors, facts):
    def fill(mine, theirs):
        for name, value in mine.items():
            fill(value, theirs[name]) if isinstance(value, dict) else value.copy_(theirs[name])

    job.set_facts(facts)
    with torch.no_grad():
        fill(job.tensors(), tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"drop_path": 0.2, "drop_rate": 0.1},
        {"ema": 0.0, "passes": 2},
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"progressive": 0.9, "progressive_first": 0, "progressive_ramp": 0.1},
        {"shared_aln": True},
    ],
)
def test_a_resumed_job_goes_on_bitwise(changes):
    whole, first, rest = (job_of(**changes) for _ in range(3))
    expected = train(whole, 0, 8)
    train(first, 0, 4)
    copy_into(rest, first.tensors(), first.facts())
    found = train(rest, 4, 8)
    for a, b in zip(expected[4:], found):
        assert all(torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for name in a)
    assert all(torch.equal(value, weights(rest)[name]) for name, value in weights(whole).items())
    assert whole.facts() == rest.facts()


def test_progressive_training_trains_the_scales_of_its_stage():
    """The loss of a stage by hand: every token counts 1 / L of all scales, the newest scale's less at first."""
    job = job_of(progressive=0.8, progressive_first=0, progressive_ramp=0.2, cond_drop=0.0)
    for step, scales, newest in ((0, 1, 1.0), (7, 2, 0.5), (19, 3, 1.0)):
        assert job.progressive.stage(step, 20) == scales - 1
        assert job.progressive.newest_weight(step, 20) == pytest.approx(newest)
        before = {k: v.clone() for k, v in job.var.state_dict().items()}
        (values,) = train(job, step, step + 1)
        by_hand = build_transformer(job.settings, job.vae, 3)
        by_hand.load_state_dict(before)
        by_hand.cond_drop_rate = 0.0
        batch = RandomTokens().stack(range(8 * step, 8 * step + 8))
        x_BLC, tokens_BL = teacher_input(job.vae, batch.tokens_BL, 3)
        logits = by_hand(batch.label_B, x_BLC)
        end = (1, 5, 14)[scales - 1]
        ce_BL = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BL.flatten(), reduction="none")
        weight_L = torch.full((end,), 1 / 14)
        weight_L[end - PATCH_NUMS[scales - 1] ** 2 :] *= newest
        loss = (ce_BL.view(8, L)[:, :end] * weight_L).sum(1).mean()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in by_hand.parameters() if p.grad is not None])
        assert float(values["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
        assert float(values["loss"]) == pytest.approx(float(ce_BL.view(8, L)[:, :end].mean()), rel=1e-5)
        assert values["loss_per_scale"].isnan().tolist() == [si >= scales for si in range(3)]
    assert job.var.prog_si == -1


def test_recomputing_changes_no_gradient():
    plain, again = job_of(drop_path=0.3), job_of(drop_path=0.3, recompute=True)
    train(plain, 0, 2)
    train(again, 0, 2)
    for a, b in zip(plain.gradients[1], again.gradients[1]):
        assert torch.equal(a, b)


def test_compiled_gives_the_same_gradients(monkeypatch):
    """Traced as for any compiler, and run as traced: generating code for it takes minutes."""
    traced = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(TeacherForcing, "compile", traced, raising=False)
    plain, compiled = job_of(), job_of(compile=True)
    train(plain, 0, 1)
    train(compiled, 0, 1)
    assert_close(dict(enumerate(compiled.gradients[0])), dict(enumerate(plain.gradients[0])), 1e-5)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_look_at_the_weights_leaves_training_as_it_was(tmp_path, ema):
    """Saving, sampling and evaluating change no later step: drop path stays on, also where no average is kept."""
    alone, looked_at = (job_of(ema=ema, drop_path=0.5) for _ in range(2))
    expected = train(alone, 0, 3)
    found = []
    for step in range(3):
        found += train(looked_at, step, step + 1)
        for look in (
            looked_at.evaluate,
            lambda: looked_at.model_writer()(tmp_path / "model"),
            lambda: looked_at.draw_samples(tmp_path / "samples.png", 0),
        ):
            look()
            assert all(module.training for module in looked_at.var.modules())
    assert [float(values["loss"]) for values in found] == [float(values["loss"]) for values in expected]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_types_learn_as_float32_does(precision):
    """Losses of 12 steps are off by something, half types being in use, and by 2e-2 at most."""
    exact, half = job_of(), job_of(precision=precision)
    a, b = (torch.stack([v["loss"] for v in train(job, 0, 12)]) for job in (exact, half))
    assert 0 < (a - b).abs().max() < 2e-2
    assert half.evaluate()["held_out_loss"] == pytest.approx(exact.evaluate()["held_out_loss"], abs=2e-2)


def test_float16_that_overflows_costs_a_step_and_is_no_failure():
    job = job_of(precision="float16")
    job.precision.scaler._scale.fill_(2.0**40)
    before = weights(job)
    (values,) = train(job, 0, 1)
    assert values["grad_norm"] == 0
    assert all(torch.equal(v, weights(job)[k]) for k, v in before.items() if not k.startswith("ema."))
    assert job.facts()["scaler"]["scale"] == 32768  # halved, and the most that the published code lets it be
    job.precision.scaler._scale.fill_(1e-4)  # where halving has not helped for long, it is one
    with torch.no_grad():
        job.var.head.weight.fill_(float("inf"))
    assert not train(job, 1, 2)[0]["grad_norm"].isfinite()


def test_labels_are_hidden_as_often_as_asked():
    job = job_of(cond_drop=0.25)
    hidden = torch.cat([job._hidden(step, 0, 8) for step in range(500)]).float().mean()
    assert abs(float(hidden) - 0.25) < 0.03


def test_a_run_keeps_its_classes_and_its_tokenizer():
    job = job_of()
    facts = job.facts()
    with pytest.raises(UserError, match="data: has 3 classes, the run was trained with 2"):
        job.set_facts({**facts, "classes": ["a", "b"]})
    with pytest.raises(UserError, match="tokenizer: this run was trained on the tokens of other weights"):
        job.set_facts({**facts, "tokenizer_hash": "0" * 64})


def test_initial_weights_from_a_model_folder(tmp_path):
    job = job_of()
    save_checkpoint(tmp_path, job.vae, job.var)
    other = job_of(seed=9, init_from=str(tmp_path))
    assert all(torch.equal(v, other.var.state_dict()[k]) for k, v in job.var.state_dict().items())
    with pytest.raises(UserError, match=r"init_from: .* has another shape than the settings describe"):
        job_of(depth=3, init_from=str(tmp_path))
    RandomTokens.classes = ["a", "b"]
    try:
        with pytest.raises(UserError, match=r"init_from: .* has 3 classes, the data has 2"):
            job_of(init_from=str(tmp_path))
    finally:
        RandomTokens.classes = ["a", "b", "c"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"passes": 3}, r"batch: got 8, expected a multiple of 1 \(ranks\) times 3 \(parts\)"),
        ({"parallel": "tensor"}, "parallel: got 'tensor', expected one of ddp, fsdp"),
        ({"parallel": "fsdp", "precision": "float16"}, "precision: got float16 with parallel fsdp"),
        ({"precision": "float8"}, "precision: got 'float8'"),
        ({"depth": 0}, "depth: got 0"),
        ({"base_lr": math.nan}, "base_lr: got nan"),
        ({"schedule": "slow"}, "schedule: got 'slow'"),
        ({"num_heads": 5}, "embed_dim: got 32, expected a multiple of num_heads = 5"),
        ({"progressive": 1.5}, "progressive: got 1.5"),
        ({"ema": 1.0}, "ema: got 1.0"),
    ],
)
def test_bad_settings_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        job_of(**changes)
    if "progressive" not in changes:
        return
    with pytest.raises(UserError, match="progressive: needs a run whose length is known"):
        job_of(steps=None, progressive=0.5)


# What the public training script and its argument defaults make of the commands in its README.
PUBLISHED = {
    "d16": (16, 768, 200, 3e-4, 1e-3, 0.1, 0.05, False),
    "d20": (20, 768, 250, 3e-4, 1e-3, 0.1, 0.05, False),
    "d24": (24, 768, 350, 2.4e-4, 1e-4, 0.01, 0.05, False),
    "d30": (30, 1024, 350, 3.2e-4, 1e-5, 0.01, 0.08, False),
    "d36-512": (36, 768, 350, 2.4e-4, 5e-6, 0.01, 0.08, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name):
    depth, batch, epochs, lr, gate_start, last_lr, last_decay, shared = PUBLISHED[name]
    chosen = dict(TRANSFORMER_PRESETS[name])
    assert chosen.pop("epochs") == epochs
    assert chosen.pop("patch_nums")[-1] == (32 if name == "d36-512" else 16)
    s = TransformerSettings(**chosen)
    assert (s.depth, s.batch, s.gate_start, s.last_lr, s.shared_aln) == (depth, batch, gate_start, last_lr, shared)
    assert s.lr == pytest.approx(lr) and max(s.last_weight_decay, s.weight_decay) == last_decay
    assert (s.schedule, s.warmup, s.first_lr, s.clip, s.precision) == ("lin0", 1 / 50, 0.005, 2.0, "float16")
    assert (s.head_start, s.modulation_start, s.weight_start, s.ema) == (0.02, 0.5, -1, 0)
    with torch.device("meta"):
        var = build_transformer(s, VQVAE(ch=32), 1000)
    assert (var.C, var.num_heads, var.depth) == (64 * depth, depth, depth)
    assert var.drop_path_rate == pytest.approx(0.1 * depth / 24)
