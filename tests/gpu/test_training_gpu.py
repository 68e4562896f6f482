"""Both trainers on a CUDA device: the CPU's losses, half types, the fused operators' loss curve, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

from tests.training import tokenizer_job_util as tokenizer_util
from tests.training.transformer_job_util import job_of, train
from var_fast.training.loop import Cadence, run_loop
from var_fast.training.ranks import Ranks
from var_fast.training.schedule import Limits

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def exact_float32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def gpu() -> Ranks:
    return Ranks(device=torch.device(DEVICE))


def losses(found) -> torch.Tensor:
    return torch.tensor([float(values["loss"]) for values in found])


@pytest.mark.parametrize(
    "changes, tolerance",
    [
        ({}, 1e-4),
        ({"passes": 2, "recompute": True}, 1e-4),
        ({"precision": "bfloat16"}, 3e-2),
        ({"precision": "float16"}, 1e-2),
        ({"progressive": 0.9, "progressive_first": 0}, 1e-4),
    ],
)
def test_the_transformers_losses_are_the_cpus(changes, tolerance):
    """Twelve steps of AdamW, whose divisions let differences grow; float32 on both, or a half type against it."""
    on_cpu, on_gpu = job_of(**{k: v for k, v in changes.items() if k != "precision"}), job_of(gpu(), **changes)
    on_gpu.var.load_state_dict(on_cpu.var.state_dict())  # a device draws first weights of its own
    ours, theirs = losses(train(on_gpu, 0, 12)), losses(train(on_cpu, 0, 12))
    assert (ours - theirs).abs().max() < tolerance * 3


def test_fused_operators_give_the_references_loss_curve(monkeypatch):
    """The mean of the last 50 of 500 steps in bfloat16: random tokens are learned by heart alike."""
    fused = losses(train(job_of(gpu(), steps=500, precision="bfloat16"), 0, 500))
    monkeypatch.setenv("VAR_FAST_BACKEND", "reference")
    reference = losses(train(job_of(gpu(), steps=500, precision="bfloat16"), 0, 500))
    noise = reference[-50:].std()
    assert (fused[-50:].mean() - reference[-50:].mean()).abs() < noise


@pytest.mark.parametrize(
    "options", [{}, {"discriminator": "patchgan", "r1": 1.0, "lecam": 0.1}, {"gradient": "rotation"}]
)
def test_the_tokenizers_losses_are_the_cpus(options):
    """Three steps from random codes: later, or from k-means, a code chosen otherwise would change all that follows."""
    settings = replace(tokenizer_util.TINY, codebook_start="random", revive_every=0, **options)
    ours = tokenizer_util.run_steps(tokenizer_util.make_job(settings, gpu()), 0, 3)
    theirs = tokenizer_util.run_steps(tokenizer_util.make_job(settings), 0, 3)
    assert losses(ours).tolist() == pytest.approx(losses(theirs).tolist(), rel=1e-3)


def test_the_tokenizer_trains_with_every_part_of_it():
    settings = replace(tokenizer_util.TINY, precision="bfloat16", discriminator="patchgan", r1=1.0, lecam=0.1)
    job = tokenizer_util.make_job(settings, gpu())
    found = losses(tokenizer_util.run_steps(job, 0, 20))
    assert found.isfinite().all() and found[-5:].mean() < found[:5].mean()
    assert job.evaluate()["val_psnr_db"] > 5


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """By way of a checkpoint on the disk. A GPU adds in no fixed order: the losses agree to 1e-3."""
    cadence = Cadence(save_every_steps=6, eval_every_steps=0, sample_every_steps=0, log_every_steps=1)

    def run(out, job):
        return run_loop(job, tmp_path / out, Limits(steps=12), cadence=cadence, tensorboard=False)

    assert run("whole", job_of(gpu(), steps=12)).finished
    stopped = job_of(gpu(), steps=12)
    monkeypatch.setattr(stopped, "batches", lambda first: islice(job_of(gpu(), steps=12).batches(first), 6))
    with pytest.raises(StopIteration):  # after the checkpoint of step 6
        run("cut", stopped)
    assert run("cut", job_of(gpu(), steps=12)).finished
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("whole", "cut")]
    curves = [[line["loss"] for line in map(json.loads, log) if line["kind"] == "train"] for log in logs]
    assert len(curves[0]) == len(curves[1]) == 12 and curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert (tmp_path / "cut" / "samples").is_dir()
