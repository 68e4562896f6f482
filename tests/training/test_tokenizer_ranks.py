"""The tokenizer's trainer on two ranks (gloo): what one process computes with the doubled batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.training.tokenizer_job_util import TINY, catch_gradients, make_job, run_steps, write_weight_files
from tests.two_ranks import on_two_ranks
from var_fast.training.files import weights_hash
from var_fast.training.ranks import Ranks

PAIRED = {
    "plain": dict(codebook_start="random"),
    "rotation": dict(codebook_start="random", gradient="rotation"),
    "patchgan": dict(codebook_start="random", discriminator="patchgan", r1=1.0, lecam=0.1),
    # Networks that enlarge the reconstruction's rounding are compared without it.
    "float64: dino, lpips, rotation": dict(
        codebook_start="random", discriminator="dino", r1=1.0, lecam=0.1, lpips=0.5, gradient="rotation"
    ),
}


@contextmanager
def computed_in(name: str) -> Iterator[None]:
    """With a name that begins with float64, all that is made in the block is in float64, .float() included."""
    if not name.startswith("float64"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def all_findings(weight_files: dict[str, str], ranks: Ranks) -> dict:
    """What is to be the same on two ranks as on one; collective."""
    found = {}
    for name, options in PAIRED.items():
        with computed_in(name), pytest.MonkeyPatch.context() as patch:
            job = make_job(replace(TINY, **weight_files, **options), ranks)
            gradients = catch_gradients(patch, job)
            metrics = job.step(0, 0.0, next(job.batches(0)))
            found[name] = dict(gradients=gradients, hits=job.vae.quantize.hit_SV, weight=metrics.get("gan_weight"))
    job = make_job(replace(TINY, discriminator="patchgan"), ranks)
    found["start"] = job.vae.quantize.embedding.weight.detach().clone()
    # Before anything is trained: rounding, which differs, grows with every step.
    found["evaluation"] = job.evaluate()
    run_steps(job, 0, 7)
    found["hash"] = weights_hash(job.vae), weights_hash(job.ema.average), weights_hash(job.adversary.network)
    found["later evaluation"] = job.evaluate()
    return found


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """Of both ranks, and of one process alone."""
    folder = tmp_path_factory.mktemp("ranks")
    weight_files = write_weight_files(folder)
    (both,) = on_two_ranks(partial(all_findings, weight_files))
    return *both, all_findings(weight_files, Ranks())


@pytest.mark.parametrize("name", PAIRED)
def test_two_ranks_give_the_gradients_of_one_with_the_doubled_batch(name, findings):
    """Every parameter of both networks: the norm of the difference, relative to the norm of the largest gradient of the
    network. In float32 it is about 5e-7, in float64 1e-15. The discriminator has more of it: its gradient is the
    difference of two that are nearly equal.
    """
    *both, alone = (found[name] for found in findings)
    for rank in both:
        assert torch.equal(rank["hits"], alone["hits"])
        assert rank["gradients"].keys() == alone["gradients"].keys()
        for network, expected in alone["gradients"].items():
            ours = rank["gradients"][network]
            scale = max(float(g.norm()) for g in expected.values())
            worst = max(float((ours[n] - g).norm()) / scale for n, g in expected.items())
            allowed = 1e-12 if name.startswith("float64") else 1e-6 if network == "model" else 3e-6
            assert worst < allowed, (network, worst)
    if alone["weight"] is not None:
        torch.testing.assert_close(both[0]["weight"], alone["weight"], rtol=1e-5, atol=0)


def test_two_ranks_start_from_the_codes_of_one(findings):
    first, second, alone = findings
    assert torch.equal(first["start"], second["start"])
    torch.testing.assert_close(first["start"], alone["start"], rtol=1e-4, atol=1e-5)


def test_ranks_stay_the_same_through_revival_and_evaluate_together(findings):
    first, second, alone = findings
    assert first["hash"] == second["hash"]
    assert first["later evaluation"] == second["later evaluation"] and first["evaluation"] == second["evaluation"]
    for name, value in alone["evaluation"].items():
        assert first["evaluation"][name] == pytest.approx(value, rel=1e-5), name
