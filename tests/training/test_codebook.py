"""The codebook's start, by k-means and otherwise, and the revival of dead codes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from var_fast.errors import UserError
from var_fast.training.code_use import CodeUse
from var_fast.training.codebook import draw_candidates, residual_vectors, revive_codes, start_codebook
from var_fast.training.kmeans import kmeans, nearest
from var_fast.training.tokenizer_settings import TokenizerSettings, build_tokenizer

SETTINGS = TokenizerSettings(size=16, vocab_size=24, z_channels=4, ch=32, ch_mult=(1, 1, 1), patch_nums=(1, 2, 4))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=seeded(seed)) * 2 - 1


@pytest.fixture
def vae():
    torch.manual_seed(0)
    made = build_tokenizer(SETTINGS, test_mode=False)
    torch.nn.init.normal_(made.quantize.embedding.weight)
    return made


def test_residual_vectors_find_the_codes_the_tokenizer_finds(vae):
    """The nearest code of every vector is the token; float32 distances of random vectors do not tie."""
    img = images(3)
    codebook = vae.quantize.embedding.weight.detach()
    for (z, distance), idx in zip(residual_vectors(vae, img), vae.img_to_idxBl(img), strict=True):
        exact = torch.cdist(z.double(), codebook.double()).square()
        assert torch.equal(exact.argmin(1), idx.flatten())
        torch.testing.assert_close(distance.double(), exact.amin(1), rtol=1e-4, atol=1e-4)


def test_residual_vectors_are_compared_at_unit_length_with_znorm(vae):
    vae.quantize.using_znorm = True
    img = images(3)
    codebook = F.normalize(vae.quantize.embedding.weight.detach().double(), dim=-1)
    for (z, distance), idx in zip(residual_vectors(vae, img), vae.img_to_idxBl(img), strict=True):
        exact = torch.cdist(F.normalize(z.double(), dim=-1), codebook).square()
        assert torch.equal(exact.argmin(1), idx.flatten())
        torch.testing.assert_close(distance.double(), exact.amin(1), rtol=1e-4, atol=1e-5)


def test_dead_codes_move_onto_data_and_live_ones_stay(vae):
    img = images(4)
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
    assert revive_codes(vae, dead, img, 1, optimizer=optimizer, average=average) == int(dead.sum())
    assert torch.equal(weight[:5], before[:5])
    assert (torch.cdist(weight[5:].detach(), data).amin(1) < 1e-2).all()
    assert torch.equal(average.quantize.embedding.weight[5:], weight[5:])
    assert (state["exp_avg"][5:] == 0).all() and (state["exp_avg"][:5] == 1).all()
    used = torch.cat([i.flatten() for i in vae.img_to_idxBl(img)]).unique()
    assert (used >= 5).any()


def test_revival_is_a_function_of_the_seed_and_leaves_the_global_generator_alone(vae):
    start = vae.quantize.embedding.weight.detach().clone()

    def revived(seed: int) -> torch.Tensor:
        with torch.no_grad():
            vae.quantize.embedding.weight.copy_(start)
        revive_codes(vae, torch.ones(24, dtype=torch.bool), images(2), seed)
        return vae.quantize.embedding.weight.detach().clone()

    state = torch.get_rng_state()
    first, again, other = revived(1), revived(1), revived(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_dead_codes_no_change(vae):
    before = vae.quantize.embedding.weight.detach().clone()
    assert revive_codes(vae, torch.zeros(24, dtype=torch.bool), images(1), 0) == 0
    assert torch.equal(vae.quantize.embedding.weight, before)


def test_candidates_come_from_every_scale_and_prefer_the_badly_served():
    coarse, fine = torch.full((100, 1), 1.0), torch.full((1600, 1), 2.0)
    far = torch.zeros(1600)
    far[:100] = 1.0
    fine[:100] = 3.0
    drawn = draw_candidates([(coarse, torch.ones(100)), (fine, far)], 100, seeded()).flatten()
    assert drawn.shape == (100,)
    # Sides 10 and 40: about a fifth of the draws is coarse.
    assert 15 <= int((drawn == 1).sum()) <= 25
    assert not (drawn == 2).any()


def test_kmeans_finds_separate_clusters():
    true = torch.randn(20, 6, generator=seeded()) * 10
    z = true.repeat(30, 1) + 0.01 * torch.randn(600, 6, generator=seeded(1))
    centres = kmeans(z, torch.ones(600), 20, seeded(2))
    torch.testing.assert_close(torch.cdist(true, centres).amin(1), torch.zeros(20), atol=0.02, rtol=0)


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_serves_vectors_better_than_a_random_choice(cosine):
    """Of uneven, overlapping data. Random choices leave 1.7 to 2.1 times the error."""
    draw = seeded()
    spread = torch.randn(2000, 1, generator=draw).exp()
    z = torch.randn(2000, 8, generator=draw) * spread + 2 * torch.randn(8, generator=draw)
    weight = torch.rand(2000, generator=draw) + 0.1

    def error(centres: torch.Tensor) -> float:
        return float((weight * nearest(z, centres, cosine)[1]).sum() / weight.sum())

    found = error(kmeans(z, weight, 64, seeded(1), cosine=cosine))
    chosen = [error(z[torch.randperm(2000, generator=seeded(seed))[:64]]) for seed in range(5)]
    assert found < 0.8 * min(chosen)


def test_a_heavy_vector_draws_its_centre():
    """With one centre it is the weighted mean."""
    z, weight = torch.randn(50, 3, generator=seeded()), torch.rand(50, generator=seeded(1))
    expected = (weight[:, None] * z).sum(0) / weight.sum()
    torch.testing.assert_close(kmeans(z, weight, 1, seeded(2))[0], expected)


def test_fewer_vectors_than_centres_are_repeated():
    z = torch.randn(5, 3, generator=seeded())
    centres = kmeans(z, torch.ones(5), 12, seeded(1))
    assert centres.shape == (12, 3)
    assert (torch.cdist(centres, z).amin(1) < 1e-5).all() and (torch.cdist(z, centres).amin(1) < 1e-5).all()


def start_error(vae, kind: str) -> float:
    """Mean over scales of the mean squared distance of the feature map's own vectors to the nearest code."""
    start_codebook(vae, kind, (images(8, seed) for seed in range(3)), 7)
    codes = vae.quantize.embedding.weight.detach().clone()
    with torch.no_grad():
        vae.quantize.embedding.weight.zero_()
    scales = [torch.cat([residual_vectors(vae, images(8, seed))[k][0] for seed in range(3)]) for k in range(3)]
    return sum(float(nearest(z, codes)[1].mean()) for z in scales) / 3


def test_kmeans_start_serves_the_data_better_than_drawn_or_random_codes(vae):
    kmeans_error, data_error, random_error = (start_error(vae, kind) for kind in ("kmeans", "data", "random"))
    assert kmeans_error < 0.8 * data_error
    assert kmeans_error < 0.3 * random_error


@pytest.mark.parametrize("kind", ["kmeans", "data", "random"])
def test_the_start_is_a_function_of_the_seed(vae, kind):
    made = []
    for seed in (1, 1, 2):
        start_codebook(vae, kind, iter([images(8)]), seed)
        made.append(vae.quantize.embedding.weight.detach().clone())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_features_that_are_no_numbers_start_no_codebook(vae):
    with pytest.raises(UserError, match="not finite"):
        start_codebook(vae, "kmeans", iter([images(2) * float("nan")]), 0)


def test_code_use_of_a_window():
    use = CodeUse(2, 4, torch.device("cpu"))
    for hits in ([[1, 0, 0, 1], [2, 0, 2, 4]], [[2, 0, 0, 0], [4, 0, 2, 2]], [[2, 0, 0, 0], [8, 0, 0, 0]]):
        use.add(torch.tensor(hits, dtype=torch.float32))
    assert float(use.percent()) == use.report()["train_code_use_percent"] == 75.0 and use.report()["dead_codes"] == 0
    assert use.dead_V(0.0).tolist() == [False, True, False, False]
    assert use.dead_V(0.7).tolist() == [False, True, True, True]
    use.close(0.7)
    assert use.steps == 0 and not use.hit_SV.any()
    use.add(torch.ones(2, 4))  # the next window is not reported before it is closed
    assert float(use.percent()) == 75.0
    report = use.report()
    assert report["dead_codes"] == 3 and report["train_code_use_percent"] == 75.0
    assert report["train_code_use_percent_per_scale"] == [50.0, 75.0]
    first, second = torch.tensor([5.0, 1.0]) / 6, torch.tensor([14.0, 4.0, 6.0]) / 24
    expected = [float(torch.exp(-(p * p.log()).sum())) for p in (first, second)]
    assert report["train_perplexity_per_scale"] == pytest.approx(expected, rel=1e-6)
