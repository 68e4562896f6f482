"""Editing: which tokens a mask makes anew, that the others stay the picture's, and one clear line for bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.golden_util import load_case
from var_fast import Sampler, load_checkpoint
from var_fast.engine.edit import kept_tokens, sampled_tokens
from var_fast.errors import UserError
from var_fast.images import psnr
from var_fast.ops import sample_tokens

SIZE = 64
OPTIONS = dict(cfg=2.0, top_k=20, top_p=0.9)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(load_case("adaln_l2norm").var, dtype="float32", max_batch=3)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """(5, 3, 64, 64) in [0, 1]: patches, so that tokens differ."""
    patches = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(patches, size=(SIZE, SIZE), mode="nearest")


def box(left, top, right, bottom, size=SIZE) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


# --- masks


@st.composite
def masks(draw) -> tuple[torch.Tensor, list[int]]:
    """A mask (H, W) and the sides of the scales. Blocks and single pixels, so that shares of a half come up often."""
    patch_nums = sorted(draw(st.sets(st.integers(1, 9), min_size=1, max_size=4)))
    cell, side = draw(st.sampled_from([1, 2, 4])), patch_nums[-1]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = random.random((side, side)).repeat(cell, 0).repeat(cell, 1) < draw(st.sampled_from([0, 0.2, 0.5, 0.8, 1]))
    mask ^= random.random(mask.shape) < draw(st.sampled_from([0, 0.02, 0.3]))
    return torch.from_numpy(mask), patch_nums


def share_twice(mask: torch.Tensor, pn: int, side: int, i: int, j: int) -> tuple[int, int]:
    """Twice the masked pixels, and the pixels, of token (i, j) of a pn x pn scale."""
    cell = mask.shape[0] // side
    (top, bottom), (left, right) = ((n * side // pn * cell, -(-(n + 1) * side // pn) * cell) for n in (i, j))
    part = mask[top:bottom, left:right]
    return 2 * int(part.sum()), part.numel()


@settings(deadline=None, max_examples=150)
@given(masks())
def test_a_token_is_sampled_where_half_of_its_area_is_masked(drawn):
    mask, patch_nums = drawn
    sampled = sampled_tokens(mask[None], patch_nums)
    for pn, sampled_1l in zip(patch_nums, sampled, strict=True):
        assert sampled_1l.shape == (1, pn * pn) and sampled_1l.dtype == torch.bool
        if pn == 1:
            assert sampled_1l.item() == bool(sampled[-1].all())
            continue
        shares = [share_twice(mask, pn, patch_nums[-1], i, j) for i in range(pn) for j in range(pn)]
        assert sampled_1l[0].tolist() == [masked >= pixels for masked, pixels in shares]


@settings(deadline=None, max_examples=50)
@given(masks(), st.integers(0, 2**32 - 1))
def test_masks_grow_turn_and_stand_alone(drawn, seed):
    mask, patch_nums = drawn
    more = mask | torch.from_numpy(np.random.default_rng(seed).random(mask.shape) < 0.3)
    together = sampled_tokens(torch.stack([mask, more, mask.flip(0), mask.T]), patch_nums)
    for sampled_4l, alone_1l, pn in zip(together, sampled_tokens(mask[None], patch_nums), patch_nums, strict=True):
        own, grown, flipped, turned = sampled_4l.view(4, pn, pn)
        assert torch.equal(own, alone_1l.view(pn, pn)), "no mask depends on the others"
        assert bool((own <= grown).all()), "more masked pixels never make fewer tokens"
        assert torch.equal(flipped, own.flip(0)) and torch.equal(turned, own.T)


def test_published_sides():
    quarter = box(0, 0, 128, 128, 256)
    per_scale = [int(sampled.sum()) for sampled in sampled_tokens(quarter[None], (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))]
    # of 16 cells 8 are masked each way. 3 x 3: tokens average 0-6, 5-11, 10-16, so 1, 1/2, 0 of them; as for 5 and 13,
    # the middle ones are sampled beside a whole one (1/2), not among themselves (1/4)
    assert per_scale == [0, 1, 3, 4, 8, 9, 16, 25, 48, 64]


# --- tokens


@pytest.mark.parametrize("more_smooth", [False, True])
def test_all_true_is_sampling(sampler, images, more_smooth):
    options = dict(more_smooth=more_smooth, **OPTIONS)
    made = sampler.edit(images[0], box(0, 0, SIZE, SIZE), [1, 7, 3, 10], [4, 0, 2**40, 4], **options)
    assert torch.equal(made, sampler.sample([1, 7, 3, 10], [4, 0, 2**40, 4], **options))


@pytest.mark.parametrize("more_smooth", [False, True])
def test_all_false_is_the_reconstruction(sampler, images, more_smooth):
    made = sampler.edit(images, box(0, 0, 0, 0), [1, 7, 3, 10, 0], [4, 0, 2, 4, 4], more_smooth=more_smooth, **OPTIONS)
    expected = sampler.vae.img_to_reconstructed_img(images * 2 - 1, last_one=True).add(1).div(2)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)
    assert (made[0] - made[1]).abs().max() > 0.01


def test_tokens_are_the_pictures_or_the_drawn_ones(sampler, images):
    """The loop once more, on the reference's side, with the tokens written down."""
    labels, seeds, mask = torch.tensor([1, 7]), torch.tensor([3, 4]), box(8, 16, 56, 40)
    patch_nums = sampler.var.patch_nums
    own = sampler.vae.img_to_idxBl(images[:2] * 2 - 1)
    sampled = [sampled_Bl[0] for sampled_Bl in sampled_tokens(mask[None], patch_nums)]
    changed = 0

    def draw(si, cond_BlV, uncond_BlV, t):
        nonlocal changed
        idx_Bl = sample_tokens(cond_BlV, uncond_BlV, t, OPTIONS["top_k"], OPTIONS["top_p"], seeds, si)
        for b in range(2):
            for place in range(idx_Bl.shape[1]):
                if not sampled[si][place]:
                    changed += int(idx_Bl[b, place] != own[si][b, place])
                    idx_Bl[b, place] = own[si][b, place]
        return idx_Bl, None

    *_, f_hat = sampler.var.sample_scales(labels, OPTIONS["cfg"], draw)
    made = sampler.edit(images[:2], mask, labels, seeds, **OPTIONS)
    torch.testing.assert_close(made, sampler.vae.fhat_to_img(f_hat).add(1).div(2), atol=1e-4, rtol=0)
    assert changed > 20, "the loop kept tokens that it would have drawn otherwise"


def test_kept_tokens_take_their_places_at_every_scale(sampler, images):
    vae, patch_nums = sampler.vae, sampler.var.patch_nums
    regions = torch.stack(
        [box(0, 0, 64, 32), ~box(16, 16, 48, 48), box(8, 0, 24, 60), box(0, 0, 0, 0), box(0, 0, 64, 64)]
    )
    own, sampled = vae.img_to_idxBl(images * 2 - 1), sampled_tokens(regions, patch_nums)
    first, second = kept_tokens(vae, images, regions, patch_nums, 5, max_batch=3)
    for part, keep in ((slice(0, 3), first), (slice(3, 5), second)):
        for si in range(len(patch_nums)):
            drawn_Bl = torch.full_like(own[si][part], -1)
            codes_BlC = torch.randn(*drawn_Bl.shape, vae.Cvae)
            made_Bl, none = keep(si, drawn_Bl, None)
            smooth_Bl, made_BlC = keep(si, drawn_Bl, codes_BlC)
            assert none is None and torch.equal(made_Bl, smooth_Bl)
            keep_Bl = ~sampled[si][part]
            assert torch.equal(made_Bl[keep_Bl], own[si][part][keep_Bl]) and bool((made_Bl[~keep_Bl] == -1).all())
            assert torch.equal(made_BlC[keep_Bl], vae.quantize.embedding.weight[own[si][part][keep_Bl]])
            assert torch.equal(made_BlC[~keep_Bl], codes_BlC[~keep_Bl])


# --- images


@pytest.mark.parametrize("more_smooth", [False, True])
def test_a_result_does_not_depend_on_its_batch(sampler, images, more_smooth):
    labels, seeds = [1, 7, 3, 10, 0], [4, 0, 2**40, 4, 4]
    regions = torch.stack(
        [box(0, 0, 64, 32), box(16, 16, 48, 48), ~box(16, 16, 48, 48), box(8, 0, 24, 60), box(0, 0, 0, 0)]
    )
    together = sampler.edit(images, regions, labels, seeds, more_smooth=more_smooth, **OPTIONS)
    assert together.shape == (5, 3, SIZE, SIZE) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1
    for i in range(5):
        alone = sampler.edit(
            images[i], regions[i], labels[i : i + 1], seeds[i : i + 1], more_smooth=more_smooth, **OPTIONS
        )
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=0)


def test_seeds_and_labels_change_the_result_and_repeat(sampler, images):
    region = box(0, 0, 64, 32)
    made = sampler.edit(images[0], region, [1, 1, 2], [0, 1, 0], **OPTIONS)
    assert torch.equal(made, sampler.edit(images[0], region, [1, 1, 2], [0, 1, 0], **OPTIONS))
    assert (made[0] - made[1]).abs().max() > 0.01 and (made[0] - made[2]).abs().max() > 0.01


def test_one_image_or_mask_serves_all(sampler, images):
    image, region = images[0], box(16, 16, 48, 48)
    expected = sampler.edit(image, region, [1, 2, 3, 4], [0, 1, 2, 3], **OPTIONS)
    for some_images in (image[None], image.expand(4, -1, -1, -1), image.double(), image.numpy()):
        for some_masks in (region[None], region.expand(4, -1, -1), region.expand(4, 1, -1, -1), region.numpy()):
            made = sampler.edit(some_images, some_masks, [1, 2, 3, 4], [0, 1, 2, 3], **OPTIONS)
            torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


def test_paste_keeps_pixels(sampler, images):
    regions = torch.stack([box(15, 17, 49, 48), box(0, 0, 64, 31)])
    made, pasted = (
        sampler.edit(images[:2], regions, [1, 2], [0, 1], paste=paste, **OPTIONS) for paste in (False, True)
    )
    inside_B3HW = regions[:, None].expand_as(made)
    assert torch.equal(pasted[~inside_B3HW], images[:2][~inside_B3HW])
    assert torch.equal(pasted[inside_B3HW], made[inside_B3HW])
    assert (made - images[:2])[~inside_B3HW].abs().max() > 0.01


def test_bfloat16_runs_and_stays_near(images):
    var, region = load_case("adaln_l2norm").var, box(0, 0, 0, 0)
    out, exact = (Sampler(var, dtype=dtype).edit(images[0], region, [1], [0]) for dtype in ("bfloat16", "float32"))
    # no token is drawn, so that only the decoder rounds; tokens of a bfloat16 encoder would show as 0.1 and more
    assert out.dtype == torch.float32 and (out - exact).norm() / exact.norm() < 0.02


def test_the_demo_model_keeps_what_is_outside():
    vae, var, classes, _ = load_checkpoint("demo")
    sampler = Sampler(var, dtype="float32")
    options = dict(cfg=3, top_k=100, top_p=0.7)
    face, cat = (classes.index(name) for name in ("face-smiling", "cat-face"))
    image = sampler.sample([face], [0], **options)
    region = box(8, 8, 24, 24, 32)
    made = sampler.edit(image, region, [cat] * 4, range(4), **options)
    nothing = torch.zeros_like(region)
    kept = sampler.edit(image, nothing, [cat] * 4, range(4), **options)
    inside, outside = (psnr(made[..., where], kept[..., where]) for where in (region, ~region))
    assert outside > inside + 5 and inside < 25, (inside, outside)


# --- bad input

IMAGE, MASK = torch.zeros(3, SIZE, SIZE), box(0, 0, 32, 32)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image=torch.zeros(3, 32, 32)), r"image has shape \(3, 32, 32\), expected \(3, 64, 64\)"),
        (dict(image=torch.zeros(SIZE, SIZE)), "image has shape"),
        (dict(image=torch.zeros(1, SIZE, SIZE)), "image has shape"),
        (dict(image=torch.zeros(1, 1, 3, SIZE, SIZE)), "image has shape"),
        (dict(image=IMAGE.to(torch.uint8)), "image is torch.uint8"),
        (dict(image=IMAGE.bool()), "image is torch.bool"),
        (dict(image=IMAGE - 0.1), "image holds -0.1, expected values in"),
        (dict(image=IMAGE + 1.5), "image holds 1.5, expected values in"),
        (dict(image=IMAGE * math.nan), "image holds nan, expected values in"),
        (dict(image="a.png"), "image is str, expected a tensor"),
        (dict(image=IMAGE.expand(3, -1, -1, -1)), "image is 3 of them for 2 labels"),
        (dict(image=torch.zeros(0, 3, SIZE, SIZE)), "image is 0 of them for 2 labels"),
        (dict(mask=box(0, 0, 8, 8, 32)), r"mask has shape \(32, 32\), expected \(64, 64\)"),
        (dict(mask=MASK.expand(2, 3, -1, -1)), "mask has shape"),
        (dict(mask=MASK[0]), "mask has shape"),
        (dict(mask=MASK.float()), "mask is torch.float32, expected torch.bool"),
        (dict(mask=MASK.to(torch.uint8)), "mask is torch.uint8, expected torch.bool"),
        (dict(mask=None), "mask is NoneType"),
        (dict(mask=MASK.expand(3, -1, -1)), "mask is 3 of them for 2 labels"),
        (dict(mask=torch.stack([MASK, box(3, 3, 4, 40)])), "mask is too thin: its 37 pixels"),
        (dict(labels=[11, 0]), "label_B holds 11"),
        (dict(labels=[1]), "1 labels and 2 seeds"),
        (dict(labels=[], seeds=[]), "0 labels"),
        (dict(seeds=[0.5, 1]), "seeds is"),
        (dict(top_p=2), "top_p is 2"),
    ],
)
def test_bad_arguments(sampler, changes, message):
    arguments = dict(image=IMAGE, mask=MASK, labels=[1, 2], seeds=[0, 1])
    with pytest.raises(UserError, match=message):
        sampler.edit(**{**arguments, **changes})
