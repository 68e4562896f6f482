"""The models on Triton kernels: same numbers, one graph under torch.compile, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from var_fast import VAR, VQVAE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATCH_NUMS = (1, 2, 3)


def build(**settings):
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=64, z_channels=16, ch=32, ch_mult=(1, 1), v_patch_nums=PATCH_NUMS, test_mode=False)
    options = dict(num_classes=5, depth=2, embed_dim=64, num_heads=2, patch_nums=PATCH_NUMS, attn_l2_norm=True)
    var = VAR(vae, cond_drop_rate=0.0, **(options | settings))
    var.init_weights(init_adaln=0.5, init_adaln_gamma=0.5, init_head=1.0, init_std=0.1)
    return vae.to(DEVICE), var.to(DEVICE)


def batch(vae, var, B=2):
    torch.manual_seed(1)
    tokens = [torch.randint(var.V, (B, pn * pn), device=DEVICE) for pn in PATCH_NUMS]
    with torch.no_grad():
        x = vae.quantize.idxBl_to_var_input(tokens)
    return torch.randint(5, (B,), device=DEVICE), x, torch.cat(tokens, dim=1)


def gradients(var, loss):
    var.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in var.named_parameters() if p.grad is not None}


def error(found, right):
    return ((found.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30)).item()


@pytest.fixture
def backend(monkeypatch):
    return lambda name: monkeypatch.setenv("VAR_FAST_BACKEND", name)


@pytest.mark.parametrize("settings", [{}, {"shared_aln": True}, {"attn_l2_norm": False}], ids=str)
def test_loss_and_every_gradient(backend, settings):
    vae, var = build(**settings)
    with torch.no_grad():
        inputs = batch(vae, var)
    backend("reference")
    right_loss, right_loss_S, right_accuracy_S = var.loss(*inputs)
    right = gradients(var, right_loss)
    backend("triton")
    loss, loss_S, accuracy_S = var.loss(*inputs)
    found = gradients(var, loss)
    assert error(loss, right_loss) < 1e-5 and error(loss_S, right_loss_S) < 1e-5
    assert torch.equal(accuracy_S, right_accuracy_S)
    assert found.keys() == right.keys()
    worst = max(found, key=lambda name: error(found[name], right[name]))
    assert error(found[worst], right[worst]) < 2e-5, worst


def test_logits_and_progressive_training(backend):
    vae, var = build()
    label_B, x_BLCv, _ = batch(vae, var)
    for prog_si in (-1, 0, 1):
        var.prog_si = prog_si
        end = sum(pn * pn for pn in PATCH_NUMS[: prog_si + 1]) if prog_si >= 0 else var.L
        backend("reference")
        right = var(label_B, x_BLCv[:, : end - 1])
        backend("triton")
        assert error(var(label_B, x_BLCv[:, : end - 1]), right) < 1e-5


def test_autocast_to_float16(backend):
    vae, var = build()
    inputs = batch(vae, var)
    backend("reference")
    exact = var.loss(*inputs)[0]
    right = gradients(var, exact)
    backend("triton")
    with torch.autocast(DEVICE, dtype=torch.float16):
        loss = var.loss(*inputs)[0]
    found = gradients(var, loss)
    assert error(loss, exact) < 2e-3
    assert all(torch.isfinite(g).all() for g in found.values())
    whole = [torch.cat([g.flatten() for g in (gs[name] for name in right)]) for gs in (found, right)]
    assert error(*whole) < 2e-2


def test_one_graph_under_torch_compile(backend):
    vae, var = build()
    inputs = batch(vae, var)
    backend("triton")
    right = var.loss(*inputs)[0]
    right_gradients = gradients(var, right)
    compiled = torch.compile(var.loss, fullgraph=True, backend="aot_eager")
    loss = compiled(*inputs)[0]
    found = gradients(var, loss)
    assert error(loss, right) < 1e-6
    assert max(error(found[name], right_gradients[name]) for name in found) < 1e-5
    logits = torch.compile(var, fullgraph=True, backend="aot_eager")(*inputs[:2])
    assert error(logits, var(*inputs[:2])) < 1e-6


def test_activation_checkpointing(backend, monkeypatch):
    vae, var = build()
    inputs = batch(vae, var)
    backend("triton")
    right = gradients(var, var.loss(*inputs)[0])
    for block in var.blocks:
        forward = block.forward
        monkeypatch.setattr(
            block, "forward", lambda *a, forward=forward, **k: checkpoint(forward, *a, use_reentrant=False, **k)
        )
    found = gradients(var, var.loss(*inputs)[0])
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_flags_choose_the_references(monkeypatch):
    vae, var = build(flash_if_available=False, fused_if_available=False)
    inputs = batch(vae, var)
    from var_fast.kernels import adaln_modulate, qk_norm, scale_attention, scale_cross_entropy

    def refuse(*args, **kwargs):
        raise AssertionError("a kernel ran")

    for module in (adaln_modulate, qk_norm, scale_attention, scale_cross_entropy):
        monkeypatch.setattr(module, "forward", refuse)
    monkeypatch.setenv("VAR_FAST_BACKEND", "triton")
    var.loss(*inputs)


def test_tokenizer(backend):
    vae, _ = build()
    torch.manual_seed(2)
    image = torch.rand(1, 3, 6, 6, device=DEVICE) * 2 - 1
    backend("reference")
    right = vae.img_to_idxBl(image)
    backend("triton")
    assert all(torch.equal(a, b) for a, b in zip(vae.img_to_idxBl(image), right))


@pytest.mark.gpu
def test_training_step_of_the_tokenizer_on_a_gpu(backend):
    vae, _ = build()
    image = torch.rand(4, 3, 6, 6, device=DEVICE) * 2 - 1
    backend("reference")
    right = vae(image)
    backend("triton")
    found = vae(image)
    assert error(found[0], right[0]) < 1e-3 and error(found[2], right[2]) < 1e-3


@pytest.mark.gpu
def test_bfloat16_under_autocast_on_a_gpu(backend):
    vae, var = build(embed_dim=128)
    inputs = batch(vae, var, B=8)
    backend("reference")
    exact = var.loss(*inputs)[0]
    right = gradients(var, exact)
    backend("triton")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = var.loss(*inputs)[0]
    found = gradients(var, loss)
    assert error(loss, exact) < 1e-2
    whole = [torch.cat([g.flatten() for g in (gs[name] for name in right)]) for gs in (found, right)]
    assert error(*whole) < 5e-2
