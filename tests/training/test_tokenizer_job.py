"""The tokenizer's trainer: its options, its gradients, resuming, what it reports and writes."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import repeat

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.tokenizer_job_util import (
    TINY,
    catch_gradients,
    flat,
    make_job,
    run_steps,
    write_weight_files,
)
from var_fast.checkpoint import load_checkpoint
from var_fast.errors import UserError
from var_fast.models.gradient_estimators import rotation_trick
from var_fast.training import tokenizer as tokenizer_module
from var_fast.training.files import weights_hash
from var_fast.training.order import step_seed
from var_fast.training.ranks import Ranks
from var_fast.training.tokenizer_settings import TOKENIZER_PRESETS, TokenizerSettings, build_tokenizer


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory):
    return write_weight_files(tmp_path_factory.mktemp("weights"))


OPTIONS = {
    "plain": {},
    "patchgan": dict(discriminator="patchgan", r1=1.0, r1_every=2, lecam=0.1),
    "dino": dict(discriminator="dino", r1=1.0, r1_every=2, gan_start=1, gan_warmup=2),
    "fixed weight": dict(discriminator="patchgan", adaptive_weight=False, gan=0.01),
    "lpips": dict(lpips=0.5),
    "rotation": dict(gradient="rotation", codebook_start="data"),
    "random codes, no revival": dict(codebook_start="random", revive_every=0),
    "cosine, one phi": dict(using_znorm=True, share_quant_resi=1, channels_last=False, flip=False, enlarge=1.0),
    "no phi": dict(quant_resi=0.0),
    "bfloat16": dict(precision="bfloat16", discriminator="patchgan"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_trains(name, weight_files):
    """The loss of one batch falls when it is taken again and again; the runs are deterministic."""
    job = make_job(replace(TINY, **weight_files, **OPTIONS[name]))
    found = run_steps(job, 0, 8, batches=repeat(next(job.batches(0))))
    assert all(row.keys() == found[0].keys() for row in found)
    for key, value in ((k, v) for row in found for k, v in row.items()):
        assert value == value and abs(value) < 1e6, key
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]


def test_settings_choose_the_model():
    vae = build_tokenizer(replace(TINY, gradient="rotation", using_znorm=True, beta=0.5), test_mode=False)
    assert vae.quantize.pass_gradient is rotation_trick and vae.quantize.using_znorm and vae.quantize.beta == 0.5
    published = TokenizerSettings(**TOKENIZER_PRESETS["published"])
    with torch.device("meta"):
        vae = build_tokenizer(published, test_mode=True)
    assert vae.config["v_patch_nums"] == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16] and vae.downsample * 16 == published.size
    assert TokenizerSettings(**TOKENIZER_PRESETS["demo"]) == TokenizerSettings()


@pytest.mark.parametrize("name", ["patchgan", "dino"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, weight_files):
    """What is carried over: copies of tensors(), filled in place, and facts()."""
    settings = replace(TINY, **weight_files, **OPTIONS[name], ema=0.5)
    whole = make_job(settings)
    run_steps(whole, 0, 4)
    tensors = {key: tensor.detach().clone() for key, tensor in flat(whole.tensors()).items()}
    facts = copy.deepcopy(whole.facts())
    expected = run_steps(whole, 4, 9)
    resumed = make_job(settings, start=False)
    with torch.no_grad():
        for key, tensor in flat(resumed.tensors()).items():
            tensor.copy_(tensors.pop(key))
    assert not tensors
    resumed.set_facts(facts)
    assert run_steps(resumed, 4, 9) == expected
    ours, theirs = flat(resumed.tensors()), flat(whole.tensors())
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert resumed.facts() == whole.facts() and resumed.evaluate() == whole.evaluate()


def test_a_run_is_resumed_with_the_judges_it_began_with(weight_files, tmp_path):
    settings = replace(TINY, **weight_files, lpips=1.0, discriminator="dino")
    facts = make_job(settings, start=False).facts()
    for option, entry, words in (
        ("vgg_weights", "features.0.bias", "lpips_weights, vgg_weights"),
        ("dino_weights", "cls_token", "dino_weights"),
    ):
        state = torch.load(weight_files[option], weights_only=True)
        torch.save(state, tmp_path / "moved.pth")
        other = replace(settings, **{option: str(tmp_path / "moved.pth")})
        assert other == settings
        make_job(other, start=False).set_facts(facts)
        state[entry] += 1.0
        torch.save(state, tmp_path / "moved.pth")
        with pytest.raises(UserError, match=f"{words}: the run was begun with other weights"):
            make_job(other, start=False).set_facts(facts)


def test_the_discriminator_waits_and_its_weight_grows():
    job = make_job(replace(TINY, discriminator="patchgan", gan_start=2, gan_warmup=2, adaptive_weight=False, gan=0.5))
    before = weights_hash(job.adversary.network)
    found = run_steps(job, 0, 2)
    assert all(row["gan_weight"] == row["disc_loss"] == 0.0 for row in found)
    assert weights_hash(job.adversary.network) == before
    assert [row["gan_weight"] for row in run_steps(job, 2, 5)] == [0.25, 0.5, 0.5]
    assert weights_hash(job.adversary.network) != before


def test_gradients_are_those_of_the_losses_summed(weight_files, monkeypatch):
    """Differentiated in one go, by the definition of the adaptive weight; relative difference of all gradients."""
    settings = replace(TINY, **weight_files, lpips=0.3, discriminator="patchgan", gan=0.7, vq=0.9)
    job = make_job(settings)
    batch = next(job.batches(0))
    img = job._images(batch)
    recon, _, vq_loss = job.vae(img)
    reconstruction = (recon - img).abs().mean() + (recon - img).square().mean() + 0.3 * job.lpips(recon, img).mean()
    adversarial = -job.adversary.network(recon).mean()
    last = job.vae.decoder.conv_out.weight
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (reconstruction, adversarial)]
    weight = 0.7 * (norms[0] / (norms[1] + 1e-6)).bfloat16().float()
    (reconstruction + weight * adversarial + 0.9 * vq_loss).backward()
    expected = torch.cat([p.grad.flatten() for p in job.vae.parameters() if p.requires_grad])
    job.vae.zero_grad()
    gradients = catch_gradients(monkeypatch, job)
    found = job.step(0, 0.0, batch)
    assert float(found["gan_weight"]) == pytest.approx(float(weight), rel=1e-6)
    ours = torch.cat([g.flatten() for g in gradients["model"].values()])
    assert float((ours - expected).norm() / expected.norm()) < 1e-5


def test_evaluation_samples_and_saved_model(tmp_path):
    job = make_job(TINY)
    run_steps(job, 0, 4)
    state = torch.get_rng_state()
    job.draw_samples(tmp_path / "a.png", 4)
    job.draw_samples(tmp_path / "b.png", 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    # Seven pairs of 16 pixels, eight pictures to a row, 2 pixels between them.
    assert Image.open(tmp_path / "a.png").size == (8 * 18 + 2, 2 * 18 + 2)
    found = job.evaluate()
    assert found["val_images"] == 7 and 0 < found["val_psnr_db"] < 40 and -1 < found["val_ssim"] < 1
    for side in ("val", "train"):
        for name in ("code_use_percent_per_scale", "perplexity_per_scale"):
            assert len(found[f"{side}_{name}"]) == 3
    # A scale of one token per picture cannot use more codes than there are pictures.
    assert found["val_perplexity_per_scale"][0] <= 7 + 1e-6
    job.model_writer()(tmp_path / "model")
    saved = load_checkpoint(tmp_path / "model")
    assert saved.var is None and weights_hash(saved.vae) == weights_hash(job.ema.average)
    assert weights_hash(saved.vae) != weights_hash(job.vae)
    study = job.batch_for_study(next(job.batches(0)))
    assert study["images_u8"].shape == (4, 3, 16, 16) and study["labels"].shape == (4,)


def test_without_held_out_pictures_the_training_ones_are_drawn(tmp_path):
    job = make_job(TINY, val=None)
    job.draw_samples(tmp_path / "a.png", 0)
    assert Image.open(tmp_path / "a.png").size == (8 * 18 + 2, 4 * 18 + 2)
    assert not [name for name in job.evaluate() if name.startswith("val_")]


def test_codes_are_revived_in_windows_and_not_at_the_end(monkeypatch):
    moved = []
    real = tokenizer_module.revive_codes
    monkeypatch.setattr(tokenizer_module, "revive_codes", lambda *a, **k: moved.append(a[3]) or real(*a, **k))
    job = make_job(TINY)
    run_steps(job, 0, 10, of=10)
    # Windows of 3 steps end with steps 2, 5 (progress 0.2, 0.5) and 8 (progress 0.8: too late).
    assert moved == [step_seed(3, 2), step_seed(3, 5)]
    assert job.code_use.steps == 1


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a CPU wait for a GPU's answer."""

    WAITING = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITING and not name.startswith("unique"), name
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_no_answer_of_the_device():
    """But for the end of a window of code use, where codes are revived."""
    job = make_job(replace(TINY, discriminator="patchgan", r1=1.0, lecam=0.1, gradient="rotation"))
    batch = next(job.batches(0))
    with NoWaiting():
        for step in range(2):
            job.step(step, 0.0, batch)
    with pytest.raises(AssertionError, match="nonzero|_local_scalar_dense"), NoWaiting():
        job.step(2, 0.0, batch)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(discriminator="stylegan"), "discriminator: got 'stylegan', expected one of none, patchgan, dino"),
        (dict(gradient="none"), "gradient: got 'none', expected one of straight-through, rotation"),
        (dict(codebook_start="zero"), "codebook_start: got 'zero', expected one of kmeans, data, random"),
        (dict(precision="float16"), "precision: got 'float16', expected one of float32, bfloat16"),
        (dict(lpips=1.0), "lpips: needs two files.*--lpips-weights.*--vgg-weights"),
        (dict(lpips=-1.0), "lpips: got -1.0, expected 0 or more"),
        (dict(discriminator="dino"), "dino_weights: got no file, expected .*dino_deitsmall16_pretrain.pth"),
        (dict(gan=float("nan")), "gan: got nan, expected 0 or more"),
        (dict(gan_start=-1), "gan_start: got -1"),
        (dict(gan_warmup=-1), "gan_warmup: got -1"),
        (dict(disc_lr=0.0), "disc_lr: got 0.0, expected a number above 0"),
        (dict(adaptive_most=float("inf")), "adaptive_most: got inf"),
        (dict(r1=-0.5), "r1: got -0.5"),
        (dict(r1_every=0), "r1_every: got 0, expected 1 or more"),
        (dict(lecam=float("inf")), "lecam: got inf"),
        (dict(kmeans_batches=0), "kmeans_batches: got 0"),
        (dict(share_quant_resi=-1), "share_quant_resi: got -1"),
        (dict(quant_resi=float("nan")), "quant_resi: got nan"),
        (dict(enlarge=0.5), "enlarge: got 0.5"),
        (dict(size=20), r"size: got 20, expected 4 \* 4 = 16"),
        (dict(ch=48), "48 channels, expected a multiple of 32"),
        (dict(vocab_size=0), "vocab_size: got 0"),
        (dict(lr=float("nan")), "lr: got nan"),
        (dict(revive_every=-1), "revive_every: got -1"),
    ],
)
def test_bad_settings_are_named(options, words):
    with pytest.raises(UserError, match=words):
        make_job(replace(TINY, **options), start=False)


def test_a_batch_that_ranks_cannot_share_is_named():
    with pytest.raises(UserError, match="batch: got 4, expected a multiple of 3"):
        make_job(TINY, Ranks(count=3), start=False)
