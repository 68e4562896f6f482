"""The discriminators and their losses against formulations of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from var_fast.errors import UserError
from var_fast.training.adversary import LOGGED, build_adversary
from var_fast.training.adversary.balance import adaptive_weight, last_layer_gradients
from var_fast.training.adversary.dino import DinoHeads
from var_fast.training.adversary.losses import LeCam, hinge_discriminator, hinge_generator, r1_penalty
from var_fast.training.adversary.patchgan import PatchGan
from var_fast.training.adversary.vit import DEVIATION, MEAN, VitFeatures, load_vit
from var_fast.training.ranks import Ranks

WIDTH, DEPTH, GRID = 128, 4, 3  # of the tests' vision transformer: two heads


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    """As the published file, smaller, with random weights, and an entry that is not needed."""
    draw = seeded()
    state = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + GRID * GRID, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 16, 16),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
    }
    for b in range(DEPTH):
        for name in ("norm1", "norm2"):
            state |= {f"blocks.{b}.{name}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
        for name, out, width in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 4 * WIDTH, WIDTH),
            ("mlp.fc2", WIDTH, 4 * WIDTH),
        ):
            state |= {f"blocks.{b}.{name}.weight": (out, width), f"blocks.{b}.{name}.bias": (out,)}
    state = {name: torch.randn(shape, generator=draw) * 0.05 for name, shape in state.items()}
    for name in state:
        if "norm" in name and name.endswith("weight"):
            state[name] += 1.0
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save(state, path)
    return str(path)


def test_hinge_losses():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -0.5]])
    # max(0, 1 - real): 0, 0.5, 2, 0; max(0, 1 + fake): 0, 1, 2, 0.5
    assert float(hinge_discriminator(real, fake)) == pytest.approx(0.5 * (2.5 / 4 + 3.5 / 4))
    assert float(hinge_generator(fake)) == pytest.approx(2.5 / 4)


def test_r1_is_half_the_squared_gradient_of_a_pictures_mean_logit():
    """D(x) = mean over two patches of a_n . x + |x|^2 / 2 has the gradient mean(a) + x."""
    a, x = torch.randn(2, 12, generator=seeded()), torch.randn(5, 3, 2, 2, generator=seeded(1)).requires_grad_()
    flat = x.flatten(1)
    logits = flat @ a.T + 0.5 * flat.square().sum(1, keepdim=True)
    expected = 0.5 * (a.mean(0) + flat.detach()).square().sum(1).mean()
    penalty = r1_penalty(logits, x)
    torch.testing.assert_close(penalty.detach(), expected)
    penalty.backward()  # it can be differentiated
    torch.testing.assert_close(x.grad.flatten(1), (a.mean(0) + flat.detach()) / 5)


def test_lecam_pulls_towards_running_means_of_the_other_side():
    lecam, ranks = LeCam(torch.device("cpu"), decay=0.75), Ranks()
    reals, fakes = torch.randn(3, 4, 2, generator=seeded()), torch.randn(3, 4, 2, generator=seeded(1))
    for step in range(3):
        found = lecam(reals[step], fakes[step], ranks)
        weights = torch.tensor([0.75 ** (step - i) for i in range(step + 1)])
        anchor_real, anchor_fake = (
            float((weights * x[: step + 1].mean((1, 2))).sum() / weights.sum()) for x in (reals, fakes)
        )
        expected = (reals[step] - anchor_fake).square().mean() + (fakes[step] - anchor_real).square().mean()
        torch.testing.assert_close(found, expected)


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    torch.manual_seed(0)
    last = nn.Conv2d(4, 3, 3, padding=1)
    recon, target = last(torch.randn(2, 4, 6, 6)), torch.randn(2, 3, 6, 6)
    mse, other = (recon - target).square().mean(), (recon * target).sin().mean()
    expected = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0] for loss in (mse, other)]
    at_recon = [torch.autograd.grad(loss, recon, retain_graph=True)[0] for loss in (mse, other)]
    found = last_layer_gradients(recon, last.weight, at_recon, Ranks())
    torch.testing.assert_close(found, expected)
    ratio = float(expected[0].norm() / expected[1].norm())
    assert float(adaptive_weight(*found, 1e4)) == pytest.approx(ratio, rel=2**-8)
    assert float(adaptive_weight(*found, ratio / 2)) == pytest.approx(ratio / 2, rel=2**-8)
    assert float(adaptive_weight(found[0], torch.zeros_like(found[1]), 100.0)) == 100.0


@pytest.mark.parametrize("size,patches,receptive", [(8, 2, 16), (32, 14, 16), (64, 14, 34), (128, 14, 70)])
def test_patches_of_patchgan(size, patches, receptive):
    """A logit in the middle depends on a window of the published width; group norms are left out, they see all."""
    torch.manual_seed(0)
    net = PatchGan(size)
    assert net(torch.rand(2, 3, size, size)).shape == (2, patches * patches)
    for i, layer in enumerate(net.layers):
        if isinstance(layer, nn.GroupNorm):
            net.layers[i] = nn.Identity()
    img = torch.rand(1, 3, size, size, requires_grad=True)
    middle = net(img).view(patches, patches)[patches // 2, patches // 2]
    (grad,) = torch.autograd.grad(middle, img)
    rows = grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == min(receptive, size - int(rows[0]) if receptive > size / 2 else receptive)


def test_logits_do_not_depend_on_the_rest_of_the_batch(vit_file):
    torch.manual_seed(0)
    img = torch.rand(4, 3, 32, 32) * 2 - 1
    vit = load_vit(vit_file)
    for net in (PatchGan(32), nn.Sequential(vit, DinoHeads(vit.widths).eval())):
        with torch.no_grad():
            whole, alone = net(img), torch.cat([net(one) for one in img.split(1)])
        torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def reference_features(state, img):
    """torch's own encoder layers, told the same weights; the position embedding as it is."""
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
    x = ((img + 1) / 2 - mean) / deviation
    patches = F.unfold(x, 16, stride=16).transpose(1, 2)
    tokens = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(img), 1, WIDTH), tokens], 1) + state["pos_embed"]
    outputs = [x]
    for b in range(DEPTH):
        layer = nn.TransformerEncoderLayer(
            WIDTH,
            WIDTH // 64,
            4 * WIDTH,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        names = {
            "self_attn.in_proj_": "attn.qkv.",
            "self_attn.out_proj.": "attn.proj.",
            "linear1.": "mlp.fc1.",
            "linear2.": "mlp.fc2.",
            "norm1.": "norm1.",
            "norm2.": "norm2.",
        }
        layer.load_state_dict(
            {
                f"{ours}{kind}": state[f"blocks.{b}.{theirs}{kind}"]
                for ours, theirs in names.items()
                for kind in ("weight", "bias")
            }
        )
        x = layer.train()(x)  # the training path: the other one may be fused
        outputs.append(x)
    return [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in outputs]


def test_features_are_those_of_the_vision_transformer(vit_file):
    vit, state = load_vit(vit_file), torch.load(vit_file, weights_only=True)
    img = torch.rand(2, 3, 48, 48, generator=seeded()) * 2 - 1
    with torch.no_grad():
        found, expected = vit(img), reference_features(state, img)
    assert len(found) == len(vit.widths) == 5
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in vit.parameters()) and not vit.training


def test_quarters_of_the_published_depth():
    assert VitFeatures().read_after == [3, 6, 9, 12]


@pytest.mark.parametrize("size,patches", [(16, 4), (24, 4), (48, 9), (60, 16)])
def test_features_of_any_size(vit_file, size, patches):
    assert load_vit(vit_file)(torch.rand(1, 3, size, size))[-1].shape == (1, WIDTH, patches)


def test_position_embedding_follows_the_grid():
    """Of a ramp from left to right, bicubic interpolation makes nearly a ramp, away from the edges; with the corners of
    both grids aligned it would be 0.14 and 0.10 off."""
    vit = VitFeatures(64, 1, 7).requires_grad_(False)
    vit.pos_embed[:, 1:] = torch.arange(7.0).repeat(7)[None, :, None]
    vit.pos_embed[:, 0] = 9.0
    found = vit._positions((14 * 16, 14 * 16))[0, :, 0]
    torch.testing.assert_close(found[1:].view(14, 14)[2, 3:5], torch.tensor([1.25, 1.75]), atol=0.09, rtol=0)
    assert found[0] == 9.0
    assert torch.equal(vit._positions((7 * 16, 7 * 16)), vit.pos_embed)


def test_convolutions_of_the_heads_have_a_spectral_norm_of_one():
    torch.manual_seed(0)
    heads, features = DinoHeads([64, 64]), [torch.randn(2, 64, 9), torch.randn(2, 64, 4)]
    for _ in range(50):  # a power iteration each
        assert heads(features).shape == (2, 13)
    for layer in heads.modules():
        if isinstance(layer, nn.Conv1d):
            norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
            assert float(norm) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("kind", ["patchgan", "dino"])
@pytest.mark.parametrize("options", [{}, {"r1": 1.0, "r1_every": 2}, {"lecam": 0.1}])
def test_a_discriminator_learns_and_its_word_reaches_the_pictures(kind, options, vit_file):
    torch.manual_seed(0)
    ranks = Ranks()
    adversary = build_adversary(kind, ranks, size=16, dino_weights=vit_file, lr=1e-3, clip=10.0, **options)
    real, fake = torch.rand(2, 6, 3, 16, 16, generator=seeded()) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1)
    found = [adversary.step(real, fake, step, 1e-3) for step in range(8)]
    assert tuple(found[0]) == LOGGED
    assert float(found[-1]["disc_loss"]) < float(found[0]["disc_loss"])
    assert float(found[-1]["disc_real"]) > float(found[-1]["disc_fake"])
    fake.requires_grad_()
    before = {name: p.detach().clone() for name, p in adversary.network.named_parameters()}
    adversary.generator_loss(fake).backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.requires_grad and p.grad is None for p in adversary.network.parameters())
    assert all(torch.equal(p, before[name]) for name, p in adversary.network.named_parameters())


def test_no_discriminator():
    assert build_adversary("none", Ranks(), size=16) is None


def test_missing_or_other_weights_and_small_pictures_are_named(tmp_path, vit_file):
    options = dict(lr=1e-3, clip=1.0)
    with pytest.raises(UserError, match="dino_weights: got no file, expected .*dino_deitsmall16_pretrain.pth"):
        build_adversary("dino", Ranks(), size=32, **options)
    with pytest.raises(UserError, match="dino_weights: /nowhere.pth does not exist, expected .*dino_deitsmall16"):
        build_adversary("dino", Ranks(), size=32, dino_weights="/nowhere.pth", **options)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth holds no such vision transformer"):
        load_vit(str(tmp_path / "other.pth"))
    state = torch.load(vit_file, weights_only=True)
    del state["blocks.1.mlp.fc2.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match="part.pth has no such entry for 'blocks.1.mlp.fc2.weight'"):
        load_vit(str(tmp_path / "part.pth"))
    with pytest.raises(UserError, match="size: got 4, expected 8 or more"):
        build_adversary("patchgan", Ranks(), size=4, **options)
