from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from var_fast.training.codebook import code_rows_used, draw_candidates, residual_vectors, revive_codes
from var_fast.training.tokenizer import build_tokenizer


@pytest.fixture
def vae(tiny_tokenizer):
    torch.manual_seed(0)
    made = build_tokenizer(tiny_tokenizer, test_mode=False)
    torch.nn.init.normal_(made.quantize.embedding.weight)
    return made


def test_residual_vectors_find_the_codes_the_tokenizer_finds(vae):
    """The nearest code of every vector is the token; float32 distances of random vectors do not tie."""
    img = torch.rand(3, 3, 16, 16) * 2 - 1
    codebook = vae.quantize.embedding.weight.detach()
    for (z, distance), idx in zip(residual_vectors(vae, img), vae.img_to_idxBl(img), strict=True):
        exact = torch.cdist(z.double(), codebook.double()).square()
        assert torch.equal(exact.argmin(1), idx.flatten())
        torch.testing.assert_close(distance.double(), exact.amin(1), rtol=1e-4, atol=1e-4)


def test_residual_vectors_are_compared_at_unit_length_with_znorm(vae):
    vae.quantize.using_znorm = True
    img = torch.rand(3, 3, 16, 16) * 2 - 1
    codebook = F.normalize(vae.quantize.embedding.weight.detach().double(), dim=-1)
    for (z, distance), idx in zip(residual_vectors(vae, img), vae.img_to_idxBl(img), strict=True):
        exact = torch.cdist(F.normalize(z.double(), dim=-1), codebook).square()
        assert torch.equal(exact.argmin(1), idx.flatten())
        torch.testing.assert_close(distance.double(), exact.amin(1), rtol=1e-4, atol=1e-5)


def test_gradient_rows_are_the_used_codes(vae):
    img = torch.rand(2, 3, 16, 16) * 2 - 1
    used = torch.cat([i.flatten() for i in vae.img_to_idxBl(img)]).unique()
    recon, _, vq_loss = vae(img)
    (recon.square().mean() + vq_loss).backward()
    assert torch.equal(code_rows_used(vae.quantize.embedding.weight.grad).nonzero().flatten(), used)


def test_dead_codes_move_onto_data_and_live_ones_stay(vae):
    img = torch.rand(4, 3, 16, 16) * 2 - 1
    weight = vae.quantize.embedding.weight
    with torch.no_grad():
        weight[5:] = 1e3 + torch.randn(weight.shape[0] - 5, weight.shape[1])  # far from anything
    optimizer = torch.optim.AdamW(vae.parameters())
    recon, _, vq_loss = vae(img)
    (recon.square().mean() + vq_loss).backward()
    optimizer.step()
    state = optimizer.state[weight]
    state["exp_avg"].fill_(1.0)
    before, dead = weight.detach().clone(), torch.arange(weight.shape[0]) >= 5
    data = torch.cat([z for z, _ in residual_vectors(vae, img)])
    average = type(vae)(**vae.config)
    assert revive_codes(vae, dead, img, optimizer=optimizer, average=average) == int(dead.sum())
    assert torch.equal(weight[:5], before[:5])
    assert (torch.cdist(weight[5:].detach(), data).amin(1) < 1e-2).all()
    assert torch.equal(average.quantize.embedding.weight[5:], weight[5:])
    assert (state["exp_avg"][5:] == 0).all() and (state["exp_avg"][:5] == 1).all()
    used = torch.cat([i.flatten() for i in vae.img_to_idxBl(img)]).unique()
    assert (used >= 5).any()


def test_no_dead_codes_no_change(vae):
    before = vae.quantize.embedding.weight.detach().clone()
    assert revive_codes(vae, torch.zeros(24, dtype=torch.bool), torch.rand(1, 3, 16, 16)) == 0
    assert torch.equal(vae.quantize.embedding.weight, before)


def test_candidates_come_from_every_scale_and_prefer_the_badly_served():
    torch.manual_seed(0)
    coarse, fine = torch.full((100, 1), 1.0), torch.full((1600, 1), 2.0)
    far = torch.zeros(1600)
    far[:100] = 1.0
    fine[:100] = 3.0
    drawn = draw_candidates([(coarse, torch.ones(100)), (fine, far)], 100).flatten()
    assert drawn.shape == (100,)
    # Sides 10 and 40: about a fifth of the draws is coarse.
    assert 15 <= int((drawn == 1).sum()) <= 25
    assert not (drawn == 2).any()
