"""The C++ sampling loop against the modules, scale by scale; when it stands for them and when not."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.backends import use_backend
from tests.models.golden_util import CASES, load_case
from tests.ops.on_isa import rerun_on
from var_fast import _C, VAR, VQVAE, Sampler
from var_fast.engine.graphs import bucket
from var_fast.engine.loops import choose_loop, native_can
from var_fast.engine.native_loop import NativeLoop
from var_fast.engine.native_model import native_model, subpixel_weights
from var_fast.engine.options import SamplingOptions
from var_fast.engine.python_loop import PythonLoop
from var_fast.engine.why_not_native import why_not_native
from var_fast.errors import UserError
from var_fast.ops.backend import BackendUnavailable

LABELS, SEEDS = torch.tensor([1, 5, 7]), torch.tensor([4, 2**40, -3])


@pytest.fixture(params=CASES)
def case(request):
    return load_case(request.param)


def follow(loop, tokens, cfg=1.5):
    """Guided logits of every scale, and the image, where `tokens` are the earlier scales' (golden tokens)."""
    logits = []

    def draw(si, logits_BlV):
        logits.append(logits_BlV.clone())
        return tokens[si], None

    return logits, loop.sample_drawn_by(LABELS, cfg, draw)


def reference(var, tokens, cfg=1.5):
    logits = []

    def draw(si, cond_BlV, uncond_BlV, t):
        logits.append(cond_BlV if uncond_BlV is None else (1 + t) * cond_BlV - t * uncond_BlV)
        return tokens[si], None

    *_, f_hat_BChw = var.sample_scales(LABELS, cfg, draw)
    with torch.no_grad():
        return logits, var.vae_proxy[0].fhat_to_img(f_hat_BChw).add(1).mul(0.5)


def some_tokens(var):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(var.V, (len(LABELS), pn * pn), generator=generator) for pn in var.patch_nums]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# bfloat16: its rounding, 2^-9 a value, through all layers; float16: 2^-12, of the weights alone
@pytest.mark.parametrize(
    "dtype,tolerance,image_tolerance", [("float32", 5e-6, 1e-5), ("bfloat16", 2e-2, 2e-2), ("float16", 1e-3, 1e-3)]
)
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_logits_of_every_scale_and_the_image(case, dtype, tolerance, image_tolerance, cfg):
    tokens = some_tokens(case.var)
    loop = NativeLoop(case.var.eval(), getattr(torch, dtype))
    logits, image_B3HW = follow(loop, tokens, cfg)
    expected, expected_B3HW = reference(case.var, tokens, cfg)
    for si in range(len(case.var.patch_nums)):
        assert relative(logits[si], expected[si]) < tolerance, si
    assert relative(image_B3HW, expected_B3HW) < image_tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_float32s_of_the_same_numbers(case, dtype):
    """A CPU without products of a half type computes in float32 with the weights of the large products in it."""
    if dtype == torch.bfloat16 and _C.cpu_isa() in ("avx512_bf16", "amx"):
        pytest.skip("this CPU has bfloat16 products")
    rounded = copy.deepcopy(case.var.eval())
    layers = [layer for block in rounded.blocks for layer in (block.attn.mat_qkv, block.attn.proj, block.ffn.fc1)]
    layers += [block.ffn.fc2 for block in rounded.blocks]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(layer.weight.to(dtype))
    tokens = some_tokens(case.var)
    logits, image_B3HW = follow(NativeLoop(case.var, dtype), tokens)
    expected, expected_B3HW = follow(NativeLoop(rounded, torch.float32), tokens)
    assert all(torch.equal(a, b) for a, b in zip(logits, expected)) and torch.equal(image_B3HW, expected_B3HW)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set only")
def test_a_cpu_without_bfloat16():
    rerun_on("avx2", __file__, "bfloat16- or decoder_of or half_weights")


@pytest.mark.parametrize("more_smooth", [False, True])
def test_float32_images_are_the_modules(case, more_smooth):
    options = SamplingOptions(1.5, 50, 0.9, more_smooth)
    native = NativeLoop(case.var.eval(), torch.float32).sample(LABELS, SEEDS, options)
    with use_backend("reference"):
        expected = PythonLoop(case.var, torch.float32).sample(LABELS, SEEDS, options)
    assert relative(native, expected) < 2e-5


def test_float32_images_are_bitwise_independent_of_their_batch(case):
    sampler = Sampler(case.var, dtype="float32", max_batch=64)
    labels, seeds = [i % 8 for i in range(64)], list(range(64))
    together = sampler.sample(labels, seeds)
    for i in (0, 13, 63):
        assert torch.equal(sampler.sample(labels[i : i + 1], seeds[i : i + 1])[0], together[i])


def test_published_draws_are_the_modules(case):
    def sample():
        return case.var.eval().autoregressive_infer_cfg(3, LABELS, g_seed=5, cfg=1.5, top_k=40, top_p=0.9)

    native = sample()
    assert case.var._native is not None
    with use_backend("reference"):
        assert relative(native, sample()) < 2e-5


def test_published_call_under_autocast_gives_its_type(case):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image_B3HW = case.var.eval().autoregressive_infer_cfg(3, LABELS, g_seed=0)
    assert image_B3HW.dtype == torch.bfloat16 and case.var._native.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_change_are_heard(case, dtype):
    sampler = Sampler(case.var, dtype=dtype)
    before = sampler.sample([1], [0])
    with torch.no_grad():
        case.var.blocks[1].ffn.fc2.weight.mul_(-1)  # in place, as an optimizer does
    middle = sampler.sample([1], [0])
    case.var.head.weight = nn.Parameter(case.var.head.weight.flip(0))  # and replaced
    after = sampler.sample([1], [0])
    assert not torch.equal(before, middle) and not torch.equal(middle, after)
    assert torch.equal(after, Sampler(case.var, dtype=dtype).sample([1], [0]))


def test_steps_that_leave_no_count_are_heard(case):
    """Fused optimizers and changes through .data do not raise torch's count of changes."""
    sampler = Sampler(case.var, dtype="bfloat16")
    seen = [sampler.sample([1], [0])]
    optimizer = torch.optim.AdamW(case.var.parameters(), lr=0.05, fused=True)
    for parameter in case.var.parameters():
        parameter.grad = torch.ones_like(parameter)
    versions = [parameter._version for parameter in case.var.parameters()]
    optimizer.step()
    assert versions == [parameter._version for parameter in case.var.parameters()]  # else this tests nothing
    seen.append(sampler.sample([1], [0]))
    case.var.head.weight.data.mul_(-1)
    seen.append(sampler.sample([1], [0]))
    for _ in range(2):  # the second may take the address that the first has left
        weight = case.var.head.weight.detach().roll(1, 0)
        case.var.head.weight = None
        case.var.head.weight = nn.Parameter(weight.clone())
        del weight
    seen.append(sampler.sample([1], [0]))
    assert all(not torch.equal(a, b) for a, b in zip(seen, seen[1:]))
    assert torch.equal(seen[-1], Sampler(case.var, dtype="bfloat16").sample([1], [0]))


def test_a_model_that_is_trained_lets_go_of_its_loop(case):
    case.var.eval().autoregressive_infer_cfg(1, 1)
    loop = weakref.ref(case.var._native)
    case.var.train()
    assert case.var._native is None and loop() is None
    var = case.var
    var.eval().autoregressive_infer_cfg(1, 1)
    gone = weakref.ref(var)
    case.var = None
    del var
    assert gone() is None  # at once, without the garbage collector


def test_float32_weights_are_shared(case):
    model = NativeLoop(case.var, torch.float32).model()
    with torch.no_grad():
        case.var.class_emb.weight.fill_(7)
    assert (model.class_embedding == 7).all()


def test_threads_have_buffers_of_their_own(case):
    sampler = Sampler(case.var, dtype="float32")
    expected = [sampler.sample([i], [i]) for i in range(4)]
    made = [[] for _ in expected]

    def work(i):
        for _ in range(5):
            made[i].append(sampler.sample([i], [i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(images) == 5 for images in made)
    assert all(torch.equal(image, expected[i]) for i in range(4) for image in made[i])


def test_sampling_while_a_stream_is_read(case):
    sampler = Sampler(case.var, dtype="float32")
    expected = list(sampler.stream([1, 2], [3, 4]))
    for images, same in zip(sampler.stream([1, 2], [3, 4]), expected, strict=True):
        sampler.sample([5, 6], [7, 8])
        assert torch.equal(images, same)


def test_a_stream_that_is_left_leaves_the_sampler_usable(case):
    sampler = Sampler(case.var, dtype="float32")
    expected = sampler.sample([1], [3])
    next(iter(sampler.stream([1], [2])))
    assert torch.equal(sampler.sample([1], [3]), expected)


def test_logits_that_are_not_finite_are_named_and_nothing_is_lost(case):
    sampler = Sampler(case.var, dtype="float32")
    expected = sampler.sample([1, 2], [0, 0])
    with torch.no_grad():
        bad = case.var.pos_1LC[0, 3].clone()
        case.var.pos_1LC[0, 3] = torch.inf  # the third token of scale 1
        for call in (
            lambda: sampler.sample([1, 2], [0, 0]),
            lambda: list(sampler.stream([1, 2], [0, 0])),
            lambda: sampler.sample([1, 2], [0, 0], more_smooth=True),
            lambda: case.var.autoregressive_infer_cfg(2, torch.tensor([1, 2])),
        ):
            with pytest.raises(UserError, match="scale 1, image 0"):
                call()
        case.var.pos_1LC[0, 3] = bad
    assert torch.equal(sampler.sample([1, 2], [0, 0]), expected)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def test_a_layer_that_was_replaced_goes_through_the_modules(case):
    assert why_not_native(case.var) is None
    early = Sampler(case.var, dtype="float32")
    assert isinstance(early.loop, NativeLoop)
    old = case.var.blocks[0].ffn.fc2
    new = Halved(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    case.var.blocks[0].ffn.fc2 = new
    assert "Halved" in why_not_native(case.var)
    assert isinstance(Sampler(case.var, dtype="float32").loop, PythonLoop)
    early.sample([1], [0])
    assert isinstance(early.loop, PythonLoop)
    with use_backend("native"), pytest.raises(BackendUnavailable, match="Halved"):
        choose_loop(case.var, torch.float32)


@pytest.mark.parametrize("what", ["wider", "no bias", "wrapped", "other activation", "method", "dropout", "subclass"])
def test_other_models_go_through_the_modules(case, what):
    var, C = case.var.eval(), case.var.C
    if what == "wider":
        var.blocks[1].ffn.fc1, var.blocks[1].ffn.fc2 = nn.Linear(C, 8 * C), nn.Linear(8 * C, C)
    elif what == "no bias":
        var.head = nn.Linear(C, var.V, bias=False)
    elif what == "wrapped":
        var.head = nn.Sequential(nn.Identity(), var.head)
    elif what == "other activation":
        var.blocks[0].ffn.drop = nn.SiLU()
    elif what == "method":
        var.get_logits = lambda h_BLC, cond_BD: VAR.get_logits(var, h_BLC, cond_BD) * 0.5
    elif what == "dropout":
        var.blocks[1].attn.attn_drop = 0.5
        var.blocks[1].attn.train()
    else:
        var.__class__ = type("Mine", (VAR,), {})
    assert why_not_native(var)
    with use_backend("reference"):
        torch.manual_seed(0)
        expected = Sampler(var, dtype="float32").sample([1], [0]) if what != "dropout" else None
    if expected is not None:
        assert relative(Sampler(var, dtype="float32").sample([1], [0]), expected) < 2e-5


def test_looking_at_a_model_loads_no_compiler():
    """On the meta device it would: 140 MB of modules and a second at every first image."""
    code = "import sys; from var_fast import Sampler, load_checkpoint; s = Sampler(load_checkpoint('demo').var)\n"
    code += "s.sample([0], [0]); sys.exit('sympy' in sys.modules or 'torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_layers_that_only_training_has_may_be_others(case):
    for block in case.var.blocks:
        block.drop_path = nn.Identity()
        block.ffn.drop = nn.Dropout(0.5).eval()
    assert why_not_native(case.var.eval()) is None


def test_a_repack_that_fails_leaves_the_loop_usable(case):
    loop = NativeLoop(case.var.eval(), torch.float32)
    options = SamplingOptions()
    expected = loop.sample(LABELS, SEEDS, options)
    head = case.var.head
    case.var.head = nn.Linear(case.var.C, case.var.V, bias=False)
    for weights in (None, 1):
        loop._weights = weights
        with pytest.raises(AttributeError):
            loop.sample(LABELS, SEEDS, options)
    case.var.head = head
    assert torch.equal(loop.sample(LABELS, SEEDS, options), expected)


def test_seeds_of_any_layout(case):
    sampler = Sampler(case.var, dtype="float32")
    expected = sampler.sample([1] * 4, [0, 2, 4, 6])
    assert torch.equal(sampler.sample(torch.tensor([1]).expand(4), torch.arange(8)[::2]), expected)


def test_inference_mode_and_autocast_change_nothing(case):
    expected = Sampler(case.var, dtype="float32").sample([1], [0])
    smooth = Sampler(case.var, dtype="float32").sample([1], [0], more_smooth=True)
    sampler = Sampler(case.var, dtype="float32")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sampler.sample([1], [0]), expected)
        assert torch.equal(sampler.sample([1], [0], more_smooth=True), smooth)
        assert torch.equal(list(sampler.stream([1], [0]))[-1], expected)
    assert torch.equal(sampler.sample([1], [0]), expected)


def test_copies_of_a_sampler(case):
    sampler = Sampler(case.var, dtype="float32")
    expected = sampler.sample([1], [0])
    assert torch.equal(copy.deepcopy(sampler).sample([1], [0]), expected)


def test_images_that_are_not_finite_are_counted_in_the_request(case):
    with torch.no_grad():
        case.var.class_emb.weight[3].fill_(torch.nan)
    sampler = Sampler(case.var, dtype="float32", max_batch=2)
    for call in (sampler.sample, lambda *args: list(sampler.stream(*args))):
        with pytest.raises(UserError, match="scale 0, image 4"):
            call([0, 1, 2, 1, 3], [0] * 5)


@pytest.mark.parametrize("top_k", [5.0, 10**30])
def test_any_whole_top_k(case, top_k):
    assert torch.isfinite(Sampler(case.var, dtype="float32").sample([1], [0], top_k=top_k)).all()
    with pytest.raises(UserError, match="top_k is 2.5"):
        Sampler(case.var, dtype="float32").sample([1], [0], top_k=2.5)


def test_a_hook_is_called(case):
    called = []
    handle = case.var.blocks[0].attn.register_forward_hook(lambda *_: called.append(1))
    case.var.eval().autoregressive_infer_cfg(1, 1)
    assert len(called) == len(case.var.patch_nums)
    handle.remove()
    case.var.autoregressive_infer_cfg(1, 1)
    assert len(called) == len(case.var.patch_nums) and case.var._native is not None


def test_what_else_the_native_loop_leaves_alone(case):
    case.var.eval().autoregressive_infer_cfg(1, 1)
    assert case.var._native is not None
    case.var.train().autoregressive_infer_cfg(1, 1)
    assert case.var._native is None
    case.var.eval().double()
    assert "torch.float64" in why_not_native(case.var)
    with use_backend("reference"):
        assert not native_can(load_case(case.name).var)


def test_a_model_with_few_scales_and_one_image():
    vae = VQVAE(vocab_size=16, z_channels=8, ch=32, v_patch_nums=(2,), ch_mult=(1, 1))
    var = VAR(vae, num_classes=3, depth=1, embed_dim=32, num_heads=1, patch_nums=(2,)).eval()
    with torch.no_grad():
        for block in var.blocks:
            block.ada_lin[-1].weight.normal_(std=0.1)
    options = SamplingOptions(1.5, 0, 0.0)
    label_B, seed_B = torch.tensor([3]), torch.tensor([1])
    native = NativeLoop(var, torch.float32).sample(label_B, seed_B, options)
    with use_backend("reference"):
        assert relative(native, PythonLoop(var, torch.float32).sample(label_B, seed_B, options)) < 2e-5


@pytest.mark.parametrize("h,w", [(1, 1), (3, 4)])
def test_subpixel_weights_equal_doubling_and_convolution(h, w):
    x, weight = torch.randn(2, 5, h, w, dtype=torch.float64), torch.randn(7, 5, 3, 3, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    phases = F.conv2d(x, subpixel_weights(weight), padding=1).unflatten(1, (2, 2, 7))
    for a in range(2):
        for b in range(2):
            made = phases[:, a, b, :, a : a + h, b : b + w]
            torch.testing.assert_close(made, expected[:, :, a::2, b::2])


@pytest.mark.parametrize("batch,largest,size", [(1, 64, 1), (3, 64, 4), (4, 64, 4), (33, 64, 64), (5, 6, 6), (9, 6, 6)])
def test_batches_are_captured_in_powers_of_two(batch, largest, size):
    assert bucket(batch, largest) == size


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_decoder_of_many_pixels(dtype, tolerance):
    """In float32 its convolutions are Winograd's from 64 x 64 pixels on, in bfloat16 all where the CPU has
    products of it but no AMX."""
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=16, z_channels=8, ch=32, v_patch_nums=(1, 17), ch_mult=(1, 2, 2))
    var = VAR(vae, num_classes=7, depth=1, embed_dim=32, num_heads=1, patch_nums=(1, 17)).eval()
    tokens = some_tokens(var)
    _, image_B3HW = follow(NativeLoop(var, dtype), tokens)
    _, expected_B3HW = reference(var, tokens)
    assert image_B3HW.shape == (3, 3, 68, 68)
    assert relative(image_B3HW, expected_B3HW) < tolerance


@pytest.mark.parametrize("value", ["", "-1", "many"])
def test_one_launch_rows_that_are_no_number(value, monkeypatch):
    monkeypatch.setenv("VAR_FAST_ONE_LAUNCH_ROWS", value)
    with pytest.raises(UserError, match="VAR_FAST_ONE_LAUNCH_ROWS is '.*', expected a number of tokens"):
        native_model(load_case(CASES[0]).var, torch.float32)


def test_packed_weights_of_a_float32_model_are_refused(monkeypatch):
    var = load_case(CASES[0]).var.eval()

    def with_packed_head(*arguments):
        model = native_model(*arguments)
        model.head = _C.Linear(var.head.weight.detach(), var.head.bias.detach(), _C.Layout.onednn, var.V)
        return model

    monkeypatch.setattr("var_fast.engine.native_loop.native_model", with_packed_head)
    with pytest.raises(ValueError, match="a layer's weight is packed, and its input is float32"):
        follow(NativeLoop(var, torch.float32), some_tokens(var))
