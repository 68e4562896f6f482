"""VAR beyond the golden values: progressive training, drops, initialisation, caching, copies, errors."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from tests.models.golden_util import CASES, load_case
from var_fast import VAR, VQVAE, build_vae_var
from var_fast.errors import UserError
from var_fast.models.drop_path import DropPath
from var_fast.models.published_draws import gumbel_softmax_with_rng


@pytest.fixture(params=CASES)
def case(request):
    return load_case(request.param)


def test_progressive_training_is_a_prefix(case):
    label_B, x = case.arrays["label_B"], case.arrays["var_input_BLC"]
    with torch.no_grad():
        full = case.var(label_B, x)
        for si, (_, end) in enumerate(case.var.begin_ends):
            case.var.prog_si = si
            part = case.var(label_B, x[:, : end - 1])
            torch.testing.assert_close(part, full[:, :end], atol=1e-5, rtol=1e-4)


def test_first_scale_alone_gives_every_parameter_a_gradient(case):
    case.var.prog_si = 0
    case.var(case.arrays["label_B"], None).sum().backward()  # idxBl_to_var_input gives None here
    assert all(p.grad is not None for p in case.var.parameters())


def test_wrong_length_of_teacher_forcing_is_named(case):
    with pytest.raises(ValueError, match="x_BLCv_wo_first_l"):
        case.var(case.arrays["label_B"], case.arrays["var_input_BLC"][:, 1:])


def test_class_drop_gives_the_null_class(case):
    label_B, x = case.arrays["label_B"], case.arrays["var_input_BLC"]
    null_B = torch.full_like(label_B, case.var.num_classes)
    with torch.no_grad():
        null = case.var(null_B, x)
        case.var.cond_drop_rate = 1.0
        assert torch.equal(case.var(label_B, x), null)
        case.var.cond_drop_rate = 0.0
        assert (case.var(label_B, x) - null).abs().max() > 0.01


def test_kv_caching_equals_the_masked_whole(case):
    block, C = case.var.blocks[0], case.var.C
    x, cond = torch.randn(2, case.var.L, C), torch.randn(2, C)
    cond = case.var.shared_ada_lin(cond)
    with torch.no_grad():
        whole = block(x, cond, case.var.attn_bias_for_masking)
        by_scales = block(x, cond, None, patch_nums=case.var.patch_nums)
        torch.testing.assert_close(by_scales, whole, atol=1e-5, rtol=1e-5)
        block.attn.kv_caching(True)
        steps = [block(x[:, begin:end], cond, None) for begin, end in case.var.begin_ends]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=1e-5)
        block.attn.kv_caching(False)
        first = slice(0, 1)
        torch.testing.assert_close(block(x[:, first], cond, None), whole[:, first], atol=1e-5, rtol=1e-5)


def test_kv_caching_can_be_differentiated(case):
    block, L = case.var.blocks[0], case.var.L
    x, cond = torch.randn(2, L, case.var.C), case.var.shared_ada_lin(torch.randn(2, case.var.C))
    block(x, cond, None, patch_nums=case.var.patch_nums).square().sum().backward()
    whole = block.attn.mat_qkv.weight.grad.clone()
    block.zero_grad()
    cond = cond.detach()
    block.attn.kv_caching(True)
    sum(block(x[:, begin:end], cond, None).square().sum() for begin, end in case.var.begin_ends).backward()
    torch.testing.assert_close(block.attn.mat_qkv.weight.grad, whole, atol=1e-4, rtol=1e-4)


def test_loss_is_the_cross_entropy_of_the_logits(case):
    label_B, x = case.arrays["label_B"], case.arrays["var_input_BLC"]
    target_BL = torch.cat([case.arrays[f"idx_{si}_Bl"] for si in range(len(case.var.patch_nums))], dim=1)
    loss, loss_S, accuracy_S = case.var.loss(label_B, x, target_BL, label_smoothing=0.1)
    torch.testing.assert_close(loss, case.arrays["loss_label_smoothing_0p1"], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        logits_BLV = case.var(label_B, x)
    for si, (begin, end) in enumerate(case.var.begin_ends):
        part, target = logits_BLV[:, begin:end], target_BL[:, begin:end]
        ce = F.cross_entropy(part.flatten(0, 1), target.flatten(), label_smoothing=0.1)
        torch.testing.assert_close(loss_S[si], ce, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(accuracy_S[si], (part.argmax(-1) == target).float().mean())


def test_the_generator_can_be_replaced(case):
    # The published trainer does this to give every rank its own.
    del case.var.rng
    case.var.rng = torch.Generator().manual_seed(3)
    assert case.var.rng.initial_seed() == 3


def test_one_condition_serves_all_images(case):
    x, cond = torch.randn(3, 1, case.var.C), torch.randn(1, case.var.C)
    with torch.no_grad():
        for module, c in (
            (lambda x, c: case.var.blocks[0](x, case.var.shared_ada_lin(c), None), cond),
            (case.var.head_nm, cond),
        ):
            torch.testing.assert_close(module(x, c), module(x, c.expand(3, -1)))


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_is_torchs(hard):
    logits = torch.randn(2, 3, 7)
    torch.manual_seed(5)
    expected = F.gumbel_softmax(logits, tau=0.4, hard=hard)
    ours = gumbel_softmax_with_rng(logits, 0.4, hard, rng=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, expected)


def test_attention_dropout_acts_in_training_only():
    vae = VQVAE(vocab_size=8, z_channels=4, ch=32, v_patch_nums=(1, 2), ch_mult=(1, 2))
    var = VAR(vae, num_classes=3, depth=2, embed_dim=32, num_heads=2, attn_drop_rate=0.5, patch_nums=(1, 2))
    var.init_weights(init_adaln_gamma=1.0, init_head=1.0)
    var.cond_drop_rate = 0.0
    label_B, x = torch.tensor([0, 1]), torch.randn(2, 4, 4)
    with torch.no_grad():
        assert torch.equal(var.eval()(label_B, x), var(label_B, x))
        assert not torch.equal(var.train()(label_B, x), var(label_B, x))


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    drop = DropPath(0.25).train()
    gate_BC = torch.ones(4000, 3)
    out = drop(gate_BC)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(out[:, 0], out[:, 2])
    assert abs(out[:, 0].mean() - 1) < 5 * math.sqrt(0.25 / 0.75 / 4000)
    assert torch.equal(drop.eval()(gate_BC), gate_BC)


@pytest.mark.parametrize("shared_aln", [False, True])
def test_published_initialisation(shared_aln):
    torch.manual_seed(0)
    _, var = build_vae_var(
        "cpu", patch_nums=(1, 2), V=64, Cvae=8, ch=32, num_classes=10, depth=3, shared_aln=shared_aln
    )
    C, std = 192, math.sqrt(1 / 192 / 3)
    block = var.blocks[1]

    def near(weight, expected):
        assert weight.std().item() == pytest.approx(expected, rel=0.1)

    near(block.attn.mat_qkv.weight, std)
    near(block.attn.proj.weight, std / math.sqrt(6))
    near(block.ffn.fc2.weight, std / math.sqrt(6))
    near(var.class_emb.weight, std)
    near(var.head.weight, 0.02 * std)
    near(var.head_nm.ada_lin[1].weight, 0.5 * std)
    if shared_aln:
        near(block.ada_gss[0, 0, :2], 1e-5 / math.sqrt(C))
        near(block.ada_gss[0, 0, 2:], 0.5 / math.sqrt(C))
    else:
        near(block.ada_lin[1].weight[: 2 * C], 1e-5 * std)
        near(block.ada_lin[1].weight[2 * C :], 0.5 * std)
        assert not block.ada_lin[1].bias.any()
    assert not var.head.bias.any() and var.drop_path_rate == pytest.approx(0.1 * 3 / 24)
    torch.testing.assert_close(block.attn.scale_mul_1H11, torch.full((1, 3, 1, 1), math.log(4)))


def test_building_leaves_torch_as_it_was(capsys):
    before = torch.nn.Linear.reset_parameters
    build_vae_var("cpu", patch_nums=(1, 2), V=8, Cvae=4, ch=32, num_classes=2, depth=1)
    assert torch.nn.Linear.reset_parameters is before
    assert capsys.readouterr().out == ""


def test_copies_and_pickles_sample_the_same(case):
    label_B = case.arrays["label_B"]
    image = case.var.autoregressive_infer_cfg(2, label_B, g_seed=1)
    for twin in (copy.deepcopy(case.var), pickle.loads(pickle.dumps(case.var))):
        assert torch.equal(twin.autoregressive_infer_cfg(2, label_B, g_seed=1), image)


def test_tokenizer_is_no_part_of_the_transformer(case):
    assert case.var.vae_proxy[0] is case.vae and case.var.vae_quant_proxy[0] is case.vae.quantize
    assert not any("encoder" in name or "quantize" in name for name in case.var.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near(case, dtype):
    label_B, x = case.arrays["label_B"], case.arrays["var_input_BLC"]
    with torch.no_grad():
        exact = case.var(label_B, x)
        with torch.autocast("cpu", dtype=dtype):
            half = case.var(label_B, x)
    assert half.dtype == torch.float32
    # eight bits of bfloat16 over a few layers; float16 has three more
    assert (half - exact).norm() / exact.norm() < (2e-2 if dtype == torch.bfloat16 else 4e-3)


def test_any_pyramid_samples():
    vae = VQVAE(vocab_size=8, z_channels=4, ch=32, v_patch_nums=(2,), ch_mult=(1, 2))
    var = VAR(vae, num_classes=3, depth=1, embed_dim=32, num_heads=2, patch_nums=(2,)).eval()
    assert var.autoregressive_infer_cfg(2, 1, g_seed=0).shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    "options,named",
    [
        (dict(label_B=11), "label_B holds 11"),
        (dict(label_B=torch.tensor([0, -1])), "label_B holds -1"),
        (dict(label_B=torch.tensor([0])), "label_B has shape"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(top_p=float("nan")), "top_p is nan"),
        (dict(cfg=float("inf")), "cfg is inf"),
    ],
)
def test_bad_sampling_arguments_are_named(options, named):
    var = load_case("adaln_l2norm").var
    with pytest.raises(UserError, match=named):
        var.autoregressive_infer_cfg(2, **{"label_B": 0, **options})


def test_nan_weights_name_scale_and_image():
    var = load_case("adaln_l2norm").var
    with torch.no_grad():
        var.class_emb.weight[4].fill_(float("nan"))
    with pytest.raises(UserError, match="scale 0, image 1"):
        var.autoregressive_infer_cfg(2, torch.tensor([0, 4]))


def test_patch_nums_must_be_the_tokenizers():
    vae = VQVAE(vocab_size=8, z_channels=4, ch=32, v_patch_nums=(1, 2), ch_mult=(1, 2))
    with pytest.raises(ValueError, match="patch_nums"):
        VAR(vae, depth=1, embed_dim=32, num_heads=2, patch_nums=(1, 3))
    with pytest.raises(ValueError, match="num_heads"):
        VAR(vae, depth=1, embed_dim=33, num_heads=2, patch_nums=(1, 2))
