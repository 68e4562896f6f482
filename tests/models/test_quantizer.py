"""VectorQuantizer2: phi sharing, cosine search, code-use statistics with and without ranks, progressive training."""

from __future__ import annotations

import pytest
import torch

from tests.two_ranks import on_two_ranks
from var_fast import VQVAE, VectorQuantizer2
from var_fast.models.phi import nearest_layer

PATCH_NUMS = (1, 2, 4)


def quantizer(**options):
    torch.manual_seed(0)
    settings = dict(vocab_size=13, Cvae=8, using_znorm=False, v_patch_nums=PATCH_NUMS) | options
    return VectorQuantizer2(**settings)


@pytest.mark.parametrize(
    "share,names,layer_of_scale",
    [
        (0, ["quant_resi.0", "quant_resi.1", "quant_resi.2"], [0, 1, 2]),
        (1, ["quant_resi.qresi"], [0, 0, 0]),
        (2, ["quant_resi.qresi_ls.0", "quant_resi.qresi_ls.1"], [0, 0, 1]),
        (4, [f"quant_resi.qresi_ls.{i}" for i in range(4)], [0, 2, 3]),
    ],
)
def test_phi_layers(share, names, layer_of_scale):
    q = quantizer(share_quant_resi=share)
    assert [n for n, m in q.named_modules() if isinstance(m, torch.nn.Conv2d)] == names
    layers = [dict(q.named_modules())[n] for n in names]
    assert [layers.index(q.quant_resi[si / 2]) for si in range(3)] == layer_of_scale


@pytest.mark.parametrize(
    "num_scales,of_two,of_three,of_four",
    [
        (3, "001", "012", "023"),
        (7, "0000111", "0001122", "0012233"),
        (10, "0000011111", "0000111222", "0011122333"),
        (14, "00000001111111", "00000111122222", "00011112222333"),
    ],
)
def test_layers_of_the_published_code(num_scales, of_two, of_three, of_four):
    # Read off the published code. Many scales lie half way between two layers: rounding decides, and must do it alike.
    for layers in (of_two, of_three, of_four):
        count = int(layers[-1]) + 1
        ours = [nearest_layer(count, si / (num_scales - 1)) for si in range(num_scales)]
        assert "".join(map(str, ours)) == layers


def test_no_phi_at_ratio_zero():
    assert not list(quantizer(quant_resi=0.0).quant_resi.parameters())


@pytest.mark.parametrize("using_znorm", [False, True])
def test_forward_agrees_with_tokens(using_znorm):
    q, f = quantizer(using_znorm=using_znorm), torch.randn(2, 8, 4, 4, requires_grad=True)
    f_hat, usages, vq_loss = q(f)
    assert usages is None
    f_hats = q.f_to_idxBl_or_fhat(f, to_fhat=True)
    torch.testing.assert_close(f_hat, f_hats[-1], atol=1e-5, rtol=1e-5)
    maps = [q.tokens_to_map(i, pn) for i, pn in zip(q.f_to_idxBl_or_fhat(f, to_fhat=False), PATCH_NUMS)]
    torch.testing.assert_close(q.embed_to_fhat(maps, last_one=True), f_hats[-1])
    expected = sum((1 + q.beta) * (s - f).square().mean() for s in f_hats) / len(PATCH_NUMS)
    torch.testing.assert_close(vq_loss, expected)


def test_straight_through_gradient():
    q, f = quantizer(beta=0.0), torch.randn(2, 8, 4, 4, requires_grad=True)
    g = torch.randn(2, 8, 4, 4)
    (q(f)[0] * g).sum().backward()
    torch.testing.assert_close(f.grad, g)


def test_code_use_without_a_process_group():
    q, f = quantizer().train(), torch.randn(3, 8, 4, 4)
    q(f)
    first = torch.stack([i.flatten().bincount(minlength=13) for i in q.f_to_idxBl_or_fhat(f, to_fhat=False)]).float()
    assert torch.equal(q.ema_vocab_hit_SV, first) and q.record_hit == 1
    f2 = torch.randn(3, 8, 4, 4)
    _, usages, _ = q(f2, ret_usages=True)
    second = torch.stack([i.flatten().bincount(minlength=13) for i in q.f_to_idxBl_or_fhat(f2, to_fhat=False)])
    torch.testing.assert_close(q.ema_vocab_hit_SV, 0.9 * first + 0.1 * second)
    margin = 3 * 16 / 13 * 0.08
    assert usages == pytest.approx([(row >= margin).float().mean().item() * 100 for row in q.ema_vocab_hit_SV])
    q.eval()(f)
    assert q.record_hit == 2


def _one_rank(ranks):
    q = quantizer().train()
    q(torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(1))[2 * ranks.rank :][:2])
    return q.ema_vocab_hit_SV


def test_code_use_is_summed_over_ranks():
    (found,) = on_two_ranks(_one_rank)
    q = quantizer().train()
    q(torch.randn(4, 8, 4, 4, generator=torch.Generator().manual_seed(1)))
    for hit_SV in found:
        assert torch.equal(hit_SV, q.ema_vocab_hit_SV)


def test_progressive_training_limits_the_scales():
    q, f = quantizer(), torch.randn(2, 8, 4, 4)
    full, tokens = q.f_to_idxBl_or_fhat(f, to_fhat=True), q.f_to_idxBl_or_fhat(f, to_fhat=False)
    whole_input = q.idxBl_to_var_input(tokens)
    assert whole_input.shape == (2, 4 + 16, 8)
    q.prog_si = 0
    assert q.idxBl_to_var_input(tokens) is None
    q.prog_si = 1
    assert len(q.f_to_idxBl_or_fhat(f, to_fhat=False)) == 2
    assert torch.equal(q.f_to_idxBl_or_fhat(f, to_fhat=True)[1], full[1])
    assert torch.equal(q.idxBl_to_var_input(tokens), whole_input[:, :4])


def test_teacher_forcing_input_is_what_sampling_is_given():
    q = quantizer()
    tokens = q.f_to_idxBl_or_fhat(torch.randn(2, 8, 4, 4), to_fhat=False)
    f_hat, maps = torch.zeros(2, 8, 4, 4), []
    with torch.no_grad():
        for si, (idx_Bl, pn) in enumerate(zip(tokens, PATCH_NUMS)):
            f_hat, next_map = q.get_next_autoregressive_input(si, 3, f_hat, q.tokens_to_map(idx_Bl, pn))
            maps.append(next_map.flatten(2).transpose(1, 2))
    torch.testing.assert_close(q.idxBl_to_var_input(tokens), torch.cat(maps[:-1], dim=1))


def test_eini():
    q = quantizer(vocab_size=1000)
    q.eini(0.25)
    assert q.embedding.weight.std().item() == pytest.approx(0.25, rel=0.05)
    q.eini(-3.0)
    assert 0.0029 < q.embedding.weight.abs().max() <= 0.003


def test_sizes_of_a_scale_may_differ():
    f = torch.randn(1, 8, 4, 6)
    tokens = quantizer().f_to_idxBl_or_fhat(f, to_fhat=False, v_patch_nums=[(1, 1), (2, 3), (4, 6)])
    assert [t.shape for t in tokens] == [(1, 1), (1, 6), (1, 24)]


@pytest.mark.parametrize("patch_nums", [None, (), (2, 1), (1, 1), (0, 1)])
def test_bad_patch_nums_are_named(patch_nums):
    with pytest.raises(ValueError, match="v_patch_nums"):
        quantizer(v_patch_nums=patch_nums)


def test_tokenizer_takes_small_images():
    vae = VQVAE(vocab_size=8, z_channels=4, ch=32, v_patch_nums=(1, 2), ch_mult=(1, 2))
    image = torch.rand(1, 3, 4, 4) * 2 - 1
    assert vae.downsample == 2 and vae.encode(image).shape == (1, 4, 2, 2)
    assert vae.img_to_reconstructed_img(image, last_one=True).shape == image.shape


def test_gradients_pass_through_decoding_and_teacher_forcing():
    vae = VQVAE(vocab_size=8, z_channels=4, ch=32, v_patch_nums=(1, 2), ch_mult=(1, 2), test_mode=False)
    maps = [torch.randn(1, 4, pn, pn, requires_grad=True) for pn in (1, 2)]
    vae.embed_to_img(maps, all_to_max_scale=True, last_one=True).sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps)
    image = torch.rand(1, 3, 4, 4) * 2 - 1
    vae.img_to_reconstructed_img(image, last_one=True).sum().backward()
    assert vae.decoder.conv_in.weight.grad.abs().sum() > 0 and vae.quantize.embedding.weight.grad.abs().sum() > 0
    vae.zero_grad()
    vae.quantize.idxBl_to_var_input(vae.img_to_idxBl(image)).sum().backward()
    assert vae.quantize.embedding.weight.grad.abs().sum() > 0


def test_statistics_of_another_number_of_scales_load():
    vae = VQVAE(vocab_size=8, z_channels=4, ch=32, v_patch_nums=(1, 2), ch_mult=(1, 2))
    state = vae.state_dict() | {"quantize.ema_vocab_hit_SV": torch.ones(5, 8)}
    vae.load_state_dict(state)
    assert vae.quantize.ema_vocab_hit_SV.shape == (2, 8)
