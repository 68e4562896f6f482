"""Reconstruction metrics against a plain loop over single pictures; the same on two ranks; errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.two_ranks import on_two_ranks
from var_fast import VQVAE
from var_fast.errors import UserError
from var_fast.evaluation.reconstruction import code_use, reconstruction_metrics
from var_fast.evaluation.ssim import ssim_B
from var_fast.images import psnr

pytestmark = pytest.mark.usefixtures("one_thread")


def tokenizer() -> VQVAE:
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=16, z_channels=4, ch=32, v_patch_nums=(1, 2, 4), ch_mult=(1, 2))
    vae.quantize.eini(0.5)
    return vae


def pictures(count: int = 7) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_equals_a_loop_over_pictures():
    vae, images = tokenizer(), pictures()
    found = reconstruction_metrics(vae, images.split(3))
    decibels, similarity, codes = [], [], [[] for _ in range(3)]
    for image in images:
        again = vae.img_to_reconstructed_img(image[None], last_one=True)
        decibels.append(psnr(image[None], again, peak=2.0))
        similarity.append(float(ssim_B(image[None] / 2 + 0.5, again / 2 + 0.5)))
        for k, idx in enumerate(vae.img_to_idxBl(image[None])):
            codes[k] += idx.flatten().tolist()
    assert found["images"] == 7
    assert found["psnr_db"] == pytest.approx(np.mean(decibels), rel=1e-6)
    assert found["ssim"] == pytest.approx(np.mean(similarity), abs=1e-6)
    assert found["code_use_percent"] == pytest.approx(100 * len(set().union(*codes)) / 16)
    assert found["code_use_percent_per_scale"] == pytest.approx([100 * len(set(c)) / 16 for c in codes])
    for value, own in zip(found["perplexity_per_scale"], codes):
        p = np.bincount(own, minlength=16) / len(own)
        p = p[p > 0]
        assert value == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_code_use_of_known_counts():
    counts = torch.tensor([[5, 5, 0, 0], [0, 0, 0, 9], [1, 1, 1, 1]])
    found = code_use(counts)
    assert found["code_use_percent"] == 100.0
    assert found["code_use_percent_per_scale"] == [50.0, 25.0, 100.0]
    assert found["perplexity_per_scale"] == pytest.approx([2.0, 1.0, 4.0], rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_mode_and_the_statistics_alone(training):
    vae = tokenizer().train(training)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    reconstruction_metrics(vae, [pictures(2)])
    assert vae.training is training
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def _share(ranks):
    return reconstruction_metrics(tokenizer(), pictures()[ranks.rank :: ranks.count].split(2), ranks)


def _all_on_one(ranks):
    return reconstruction_metrics(tokenizer(), pictures().split(2) if ranks.rank == 1 else [], ranks)


def _broken_on_one(ranks):
    def batches():
        if ranks.rank == 1:
            raise UserError("cannot read b.png")
        yield pictures(1)

    try:
        reconstruction_metrics(tokenizer(), batches(), ranks)
    except UserError as error:
        return str(error)


def test_two_ranks_agree_with_one():
    alone = reconstruction_metrics(tokenizer(), pictures().split(2))
    shared, lopsided, broken = on_two_ranks(_share, _all_on_one, _broken_on_one)
    for found in (*shared, *lopsided):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            # SSIM comes near 0 here, as a mean of float32 values up to 1, whose rounding is 6e-8
            assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-7 if name == "ssim" else 0), name
        assert found["code_use_percent_per_scale"] == alone["code_use_percent_per_scale"]
    assert broken == ["rank 1: cannot read b.png", "cannot read b.png"]


def test_refuses_no_pictures_and_nan():
    with pytest.raises(UserError, match="no pictures"):
        reconstruction_metrics(tokenizer(), [])
    vae = tokenizer()
    vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        reconstruction_metrics(vae, [pictures(1)])
