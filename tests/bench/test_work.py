"""The floors, against the figures that DESIGN gives for the published models and against counts by hand."""

import pytest
import torch

from bench.case import Stage
from bench.models import published_settings
from bench.work import decoder_flops, encoder_flops, floor_s, sample_work, tokenize_work, train_work
from var_fast import VAR, VQVAE, build_vae_var


@pytest.fixture(scope="module")
def d16():
    with torch.device("meta"):
        return build_vae_var("meta", **published_settings("d16"))


@pytest.mark.parametrize("batch, milliseconds", [(1, 1.8), (8, 10.2), (64, 80)])
def test_sampling_floor_of_d16_on_an_h200(d16, batch, milliseconds):
    # from 788 TFLOP/s and 4.3 TB/s; 4% below the figures, which count the decoder's up-sampling without its short form
    floor = floor_s(sample_work(*d16, batch, 2), 788e12, 4.3e12)
    assert 0.95 * milliseconds < 1e3 * floor < milliseconds


def test_training_floor_of_d16(d16):
    products, optimizer = train_work(d16[1], 1, 2)
    assert products.flops == pytest.approx(0.89e12, rel=0.03)
    assert optimizer.bytes == 28 * sum(p.numel() for p in d16[1].parameters())


def test_tokenizer_of_256_px(d16):
    assert encoder_flops(d16[0]) == pytest.approx(0.215e12, rel=0.01)
    upsampling = sum(2 * 20 * c**2 * side**2 for c, side in ((640, 16), (320, 32), (320, 64), (160, 128)))
    assert decoder_flops(d16[0]) == pytest.approx(0.394e12 - upsampling, rel=0.01)
    search = tokenize_work(d16[0], 3, 4, decode=False)[1]
    assert search.flops == 2 * 3 * 680 * 32 * 4096


def test_stages_of_a_tiny_model_by_hand():
    vae = VQVAE(vocab_size=8, z_channels=4, ch=32, ch_mult=(1, 1), v_patch_nums=(1, 2))
    var = VAR(vae, num_classes=3, depth=2, embed_dim=16, num_heads=2, patch_nums=(1, 2), mlp_ratio=2.0)
    modulation, first, last, _ = sample_work(vae, var, batch=3, element_size=4)
    weights = 16 * 48 + 16 * 16 + 2 * 16 * 32  # qkv, projection, FFN of one block
    assert modulation == Stage(2 * 4 * (2 * 16 * 96 + 16 * 32), 4 * (2 * 16 * 96 + 16 * 32))
    # the first scale: 3 conditional rows and one unconditional; only the conditional ones get logits
    assert first.flops == 4 * 1 * 2 * (2 * weights + 4 * 16 * 1) + 2 * 3 * 1 * 16 * 8
    assert last.flops == 6 * 4 * 2 * (2 * weights + 4 * 16 * 5) + 2 * 6 * 4 * 16 * 8
    assert last.bytes == 4 * (2 * weights + 16 * 8 + 2 * 6 * 2 * 16 * 5)


def test_floor_adds_the_stages_and_takes_the_larger_limit_of_each():
    assert floor_s([Stage(10.0, 1.0), Stage(1.0, 100.0)], flops_per_s=10.0, bytes_per_s=50.0) == 1.0 + 2.0
