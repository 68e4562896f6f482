"""The model in this package: it loads, samples, keeps its size, and its card states its measured numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import var_fast
from var_fast import Sampler, load_checkpoint

DEMO = Path(var_fast.__file__).parent / "demo"


@pytest.fixture(scope="module")
def demo():
    return load_checkpoint("demo")


@pytest.fixture(scope="module")
def metrics():
    return json.loads((DEMO / "metrics.json").read_text())


def test_weights_are_small_enough_to_ship():
    assert sum(f.stat().st_size for f in DEMO.iterdir()) < 30e6


def test_quality_is_what_it_must_be(metrics):
    assert metrics["tokenizer"]["held_out"]["psnr_db"] >= 22
    ours, unigram = metrics["transformer"]["held_out"], metrics["transformer"]["unigram"]
    assert len(ours["loss"]) == 7
    assert all(a < b - 0.3 for a, b in zip(ours["loss"], unigram["loss"], strict=True))
    assert all(a > b for a, b in zip(ours["accuracy_percent"], unigram["accuracy_percent"], strict=True))


def test_the_card_states_the_measured_numbers(metrics):
    card = (DEMO / "README.md").read_text()
    assert f"**{metrics['tokenizer']['held_out']['psnr_db']:.2f} dB PSNR**" in card
    rows = re.findall(r"^\| (\d) x \1 \| (.*) \|$", card, flags=re.MULTILINE)
    numbers = metrics["transformer"]
    assert [int(pn) for pn, _ in rows] == numbers["patch_nums"]
    for k, (_, cells) in enumerate(rows):
        held, unigram, train = numbers["held_out"], numbers["unigram"], numbers["train"]
        expected = [
            f"{held['loss'][k]:.2f}",
            f"{unigram['loss'][k]:.2f}",
            f"{held['accuracy_percent'][k]:.1f}",
            f"{unigram['accuracy_percent'][k]:.1f}",
            f"{train['loss'][k]:.2f}",
        ]
        assert cells.split(" | ") == expected


def test_samples_look_like_their_class(demo):
    # As far as numbers can tell: a flag reaches the left edge of the picture, a heart hardly, and a smiley is yellow.
    sampler = Sampler(demo.var, dtype="float32")
    names = ["heart", "country-flag", "face-smiling"]
    labels = [demo.classes.index(name) for name in names for _ in range(8)]
    images = sampler.sample(labels, list(range(24)), cfg=3, top_k=100, top_p=0.7)
    assert images.shape == (24, 3, 32, 32)
    hearts, flags, smileys = images.split(8)
    assert hearts[..., 13:19, :3].mean() - flags[..., 13:19, :3].mean() > 0.15  # 0.25 when measured
    red, _, blue = smileys[..., 4:28, 4:28].mean((0, 2, 3))
    assert red - blue > 0.4  # 0.63 when measured
    assert all(group.std(0).mean() > 0.02 for group in (hearts, flags, smileys)), "seeds make no difference"


def test_tokenizer_reconstructs_its_own_samples(demo):
    image = Sampler(demo.var, dtype="float32").sample([0, 1], [0, 1], cfg=3, top_k=300, top_p=0.9) * 2 - 1
    again = demo.vae.img_to_reconstructed_img(image, last_one=True)
    mse = (again - image).div(2).square().mean((1, 2, 3))
    assert (-10 * mse.log10() > 20).all()
