"""Sampler: an image is a function of its label and seed; errors are clear and leave the sampler usable."""

from __future__ import annotations

import pytest
import torch

from tests.models.golden_util import load_case
from var_fast import Sampler
from var_fast.errors import UserError


@pytest.fixture(scope="module")
def sampler():
    return Sampler(load_case("adaln_l2norm").var, dtype="float32", max_batch=3)


def test_an_image_does_not_depend_on_its_batch(sampler):
    labels, seeds = [1, 7, 3, 10, 0], [4, 0, 2**40, 4, 4]
    together = sampler.sample(labels, seeds)
    assert together.shape == (5, 3, 64, 64) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1
    for i in range(5):
        alone = sampler.sample(labels[i : i + 1], seeds[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=0)
    assert (together[3] - together[4]).abs().max() > 0.01


def test_seed_changes_the_image(sampler):
    a, b = sampler.sample([1, 1], [0, 1])
    assert (a - b).abs().max() > 0.01


def test_greedy_equals_the_published_images(sampler):
    case = load_case("adaln_l2norm")
    out = sampler.sample(case.arrays["label_B"], [0, 1], cfg=1.5, top_k=1, top_p=0)
    torch.testing.assert_close(out, case.arrays["infer_topk1_cfg1.5_B3HW"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("more_smooth", [False, True])
def test_stream_ends_with_the_sampled_images(sampler, more_smooth):
    steps = list(sampler.stream([1, 2, 3, 4], [5, 6, 7, 8], more_smooth=more_smooth))
    assert len(steps) == 4 and all(step.shape == (4, 3, 64, 64) for step in steps)
    torch.testing.assert_close(steps[-1], sampler.sample([1, 2, 3, 4], [5, 6, 7, 8], more_smooth=more_smooth))


def test_smooth_images_differ_but_repeat(sampler):
    smooth = sampler.sample([1], [0], more_smooth=True)
    assert torch.equal(smooth, sampler.sample([1], [0], more_smooth=True))
    assert (smooth - sampler.sample([1], [0])).abs().max() > 0.01


def test_bfloat16_runs_and_stays_near():
    case = load_case("adaln_l2norm")
    out = Sampler(case.var, dtype="bfloat16").sample([1, 2], [0, 1], cfg=0, top_k=1)
    exact = Sampler(case.var, dtype="float32").sample([1, 2], [0, 1], cfg=0, top_k=1)
    assert out.dtype == torch.float32
    # 0.013 where no token flips; a wrong cast shows as 0.3 and more
    assert (out - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    "kwargs,named",
    [
        (dict(labels=[11], seeds=[0]), "label"),
        (dict(labels=[-1], seeds=[0]), "label"),
        (dict(labels=[1, 2], seeds=[0]), "2 labels and 1 seeds"),
        (dict(labels=[], seeds=[]), "0 labels"),
        (dict(labels=["heart"], seeds=[0]), "labels is"),
        (dict(labels=[1.9], seeds=[0]), "labels is"),
        (dict(labels=[1], seeds=[2**63]), "seeds is"),
        (dict(labels=[1], seeds=[0], top_k=-1), "top_k is -1"),
        (dict(labels=[1], seeds=[0], top_p=1.5), "top_p is 1.5"),
        (dict(labels=[1], seeds=[0], cfg=float("nan")), "cfg is nan"),
    ],
)
def test_bad_arguments(sampler, kwargs, named):
    for call in (sampler.sample, lambda **kw: list(sampler.stream(**kw))):
        with pytest.raises(UserError, match=named):
            call(**kwargs)
    assert torch.isfinite(sampler.sample([1], [0])).all()


@pytest.mark.parametrize("kwargs", [dict(dtype="int8"), dict(device="nonsense"), dict(max_batch=0)])
def test_bad_construction(kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs))):
        Sampler(load_case("adaln_l2norm").var, **kwargs)


def test_nan_weights_are_named_by_scale_and_image():
    case = load_case("adaln_l2norm")
    sampler = Sampler(case.var, dtype="float32")
    with torch.no_grad():
        case.var.class_emb.weight[3].fill_(float("nan"))
    with pytest.raises(UserError, match="scale 0, image 1"):
        sampler.sample([2, 3], [0, 0])
    assert torch.isfinite(sampler.sample([2], [0])).all()
