"""The published code's numbers (tests/golden): float32, relative error 1e-4 or better, all tokens equal."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import torch
import torch.nn.functional as F

from tests.models.golden_util import CASES, GOLDEN, load_case
from var_fast import VAR, VQVAE

RTOL = 1e-4


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return ((out.double() - ref.double()).norm() / ref.double().norm()).item()


@pytest.fixture(params=CASES)
def case(request):
    return load_case(request.param)


def tokens(case):
    return [case.arrays[f"idx_{si}_Bl"] for si in range(len(case.var.patch_nums))]


def test_state_dict_names_and_shapes_in_order(case):
    for module, key in ((case.vae, "vqvae_state_dict"), (case.var, "var_state_dict")):
        ours = [(name, list(value.shape)) for name, value in module.state_dict().items()]
        assert ours == list(case.spec[key].items())


def test_encoder(case):
    assert relative_error(case.vae.encode(case.arrays["image_B3HW"]), case.arrays["latent_BChw"]) < RTOL


def test_tokens(case):
    ours = case.vae.img_to_idxBl(case.arrays["image_B3HW"])
    for idx_Bl, golden_Bl in zip(ours, tokens(case), strict=True):
        assert torch.equal(idx_Bl, golden_Bl)


def test_f_hat(case):
    f_hats = case.vae.quantize.f_to_idxBl_or_fhat(case.arrays["latent_BChw"], to_fhat=True)
    assert relative_error(f_hats[0], case.arrays["fhat_first_BChw"]) < RTOL
    assert relative_error(f_hats[-1], case.arrays["fhat_last_BChw"]) < RTOL


def test_reconstruction_of_image(case):
    out = case.vae.img_to_reconstructed_img(case.arrays["image_B3HW"], last_one=True)
    assert relative_error(out, case.arrays["recon_B3HW"]) < RTOL
    steps = case.vae.img_to_reconstructed_img(case.arrays["image_B3HW"])
    assert len(steps) == len(case.var.patch_nums)
    assert relative_error(steps[-1], case.arrays["recon_B3HW"]) < RTOL


@pytest.mark.parametrize(
    "same_shape,name", [(True, "recon_from_idx_B3HW"), (False, "recon_from_idx_not_same_shape_B3HW")]
)
def test_image_of_tokens(case, same_shape, name):
    out = case.vae.idxBl_to_img(tokens(case), same_shape=same_shape, last_one=True)
    assert relative_error(out, case.arrays[name]) < RTOL
    steps = case.vae.idxBl_to_img(tokens(case), same_shape=same_shape)
    sides = [s.shape[-1] for s in steps]
    down, last = case.vae.downsample, case.var.patch_nums[-1]
    assert sides == [down * (last if same_shape else pn) for pn in case.var.patch_nums]
    assert relative_error(steps[-1], case.arrays[name]) < RTOL


def test_teacher_forcing_input(case):
    out = case.vae.quantize.idxBl_to_var_input(tokens(case))
    assert relative_error(out, case.arrays["var_input_BLC"]) < RTOL


def test_logits(case):
    with torch.no_grad():
        out = case.var(case.arrays["label_B"], case.arrays["var_input_BLC"])
    assert relative_error(out, case.arrays["logits_BLV"]) < RTOL


def test_loss_and_gradients(case):
    case.var.train()
    for block in case.var.blocks:
        block.drop_path = torch.nn.Identity()
    logits_BLV = case.var(case.arrays["label_B"], case.arrays["var_input_BLC"])
    target_BL = torch.cat(tokens(case), dim=1)
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), label_smoothing=0.1)
    assert relative_error(loss, case.arrays["loss_label_smoothing_0p1"]) < RTOL
    loss.backward()
    checked = 0
    for name, param in case.var.named_parameters():
        golden_norm = case.arrays[f"gradnorm/{name}"]
        assert relative_error(param.grad.norm(), golden_norm) < RTOL, name
        head64, golden64 = param.grad.flatten()[:64], case.arrays[f"grad64/{name}"]
        # The absolute part is for a parameter whose first 64 gradients are next to nothing beside the others.
        assert (head64 - golden64).norm() <= RTOL * golden64.norm() + 1e-5 * golden_norm, name
        checked += 1
    assert checked == sum(key.startswith("gradnorm/") for key in case.arrays)


@pytest.mark.parametrize("cfg", [0.0, 1.5, 4.0])
def test_greedy_images(case, cfg):
    out = case.var.autoregressive_infer_cfg(2, case.arrays["label_B"], g_seed=7, cfg=cfg, top_k=1)
    assert relative_error(out, case.arrays[f"infer_topk1_cfg{cfg}_B3HW"]) < RTOL


def test_greedy_image_of_the_null_class(case):
    out = case.var.autoregressive_infer_cfg(1, -1, g_seed=7, top_k=1, cfg=1.5)
    assert relative_error(out, case.arrays["infer_topk1_null_B3HW"]) < RTOL


@pytest.mark.parametrize(
    "name,g_seed,with_label,options",
    [
        ("infer_seed7_topk20_topp0.9_B3HW", 7, True, dict(top_k=20, top_p=0.9)),
        ("infer_seed7_full_B3HW", 7, True, {}),
        ("infer_seed7_smooth_B3HW", 7, True, dict(more_smooth=True)),
        ("infer_seed3_nolabel_B3HW", 3, False, dict(top_k=20, top_p=0.9)),
    ],
)
def test_images_of_a_seeded_generator(case, name, g_seed, with_label, options):
    label_B = case.arrays["label_B"] if with_label else None
    out = case.var.autoregressive_infer_cfg(2, label_B, g_seed=g_seed, cfg=1.5, **options)
    assert relative_error(out, case.arrays[name]) < RTOL


def test_tokenizer_training_step(case):
    vae = VQVAE(**case.spec["vqvae"], test_mode=False)
    vae.load_state_dict(case.vae.state_dict())
    vae.train()
    image = case.arrays["image_B3HW"]
    recon, usages, vq_loss = vae(image, ret_usages=True)
    assert len(usages) == len(case.var.patch_nums) and all(0 <= use <= 100 for use in usages)
    assert relative_error(recon, case.arrays["vae_train_rec_B3HW"]) < RTOL
    assert relative_error(vq_loss, case.arrays["vae_train_vq_loss"]) < RTOL
    loss = F.mse_loss(recon, image) + vq_loss
    assert relative_error(loss, case.arrays["vae_train_loss"]) < RTOL
    loss.backward()
    checked = 0
    for name, param in vae.named_parameters():
        golden_norm = case.arrays[f"vae_gradnorm/{name}"]
        # Biases before a group norm have no true gradient: theirs is rounding, compared absolutely.
        assert abs(param.grad.norm() - golden_norm) < RTOL * golden_norm + 1e-5, name
        checked += 1
    assert checked == sum(key.startswith("vae_gradnorm/") for key in case.arrays)


def published_models():
    with gzip.open(GOLDEN / "official_state_dicts.json.gz", "rt") as f:
        return json.load(f)


@pytest.mark.parametrize("name", sorted(n for n in published_models() if n.startswith("var_")))
def test_published_transformer_layout(name):
    model = published_models()[name]
    with torch.device("meta"):
        vae = VQVAE(ch=160, v_patch_nums=model["patch_nums"])
        var = VAR(
            vae,
            depth=model["depth"],
            embed_dim=64 * model["depth"],
            num_heads=model["depth"],
            shared_aln=model["shared_aln"],
            attn_l2_norm=True,
            patch_nums=model["patch_nums"],
        )
    assert {k: list(v.shape) for k, v in var.state_dict().items()} == model["state_dict"]
    assert sum(p.numel() for p in var.parameters()) == model["parameters"]


def test_published_tokenizer_layout():
    (name,) = (n for n in published_models() if n.startswith("vae_"))
    assert re.search(r"ch160v4096z32", name)
    entry = published_models()[name]
    shapes = entry.get("state_dict", entry)
    with torch.device("meta"):
        vae = VQVAE(vocab_size=4096, z_channels=32, ch=160)
    ours = {k: list(v.shape) for k, v in vae.state_dict().items()}
    assert {k: s for k, s in ours.items() if "ema_vocab" not in k} == {
        k: s for k, s in shapes.items() if "ema_vocab" not in k
    }
