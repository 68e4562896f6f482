from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.training.conftest import entry, write_emoji
from var_fast.errors import UserError
from var_fast.training.emoji import base_group, load_emoji


@pytest.mark.parametrize(
    "unified, group",
    [
        ("1F44B-1F3FB", "1F44B"),
        ("1F468-200D-1F692", "1F9D1-1F692"),
        ("1F469-1F3FF-200D-1F692", "1F9D1-1F692"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3"),
        ("27A1-FE0F", "27A1"),
        ("2640-FE0F", "2640"),
        ("1F1EA-1F1ED", "1F1EA-1F1ED"),
    ],
)
def test_group_leaves_out_tone_gender_and_direction(unified, group):
    assert base_group(unified) == group


def test_no_group_is_on_both_sides_and_every_class_keeps_training_pictures(tmp_path):
    tools = [f"{0x1F680 + i:X}" for i in range(12)]
    jobs = [entry(f"{person}-200D-{tool}", "role", tones=3) for tool in tools for person in ("1F468", "1F469")]
    few = [entry(f"{0x1F900 + i:X}", f"few {i // 2}") for i in range(8)]
    root = write_emoji(tmp_path / "data", jobs + few)
    data = load_emoji(root, 16, skin_variants=5, min_per_class=1, held_out_fraction=0.4)
    held = {g for g, h in zip(data.groups, data.held_out, strict=True) if h}
    kept = {g for g, h in zip(data.groups, data.held_out, strict=True) if not h}
    assert held and not held & kept
    assert sum(1 for g in held if g.startswith("1F9D1")) in (4, 5)  # 40% of 12 groups, rounded either way
    assert set(data.labels[~data.held_out].tolist()) == set(range(len(data.classes)))


def test_split_depends_on_neither_skin_variants_nor_dropped_classes(emoji_folder):
    def held(**options):
        data = load_emoji(emoji_folder, 16, held_out_fraction=0.3, **options)
        return {g for g, h in zip(data.groups, data.held_out, strict=True) if h}, set(data.groups)

    reference, _ = held(skin_variants=5, min_per_class=1)
    for options in ({"skin_variants": 0, "min_per_class": 1}, {"skin_variants": 2, "min_per_class": 8}):
        some, present = held(**options)
        assert some == reference & present


def test_skin_variants_small_classes_and_components(emoji_folder):
    data = load_emoji(emoji_folder, 16, skin_variants=2)
    assert data.classes == ["animal", "shape"]
    assert data.dropped == {"rare": 3}
    assert len(data.images_u8) == 24 + 2 * 2 + 21
    assert data.names.count("1F400") == 1 and sum(n.startswith("1F400-") for n in data.names) == 2


def test_pictures_are_on_white(tmp_path):
    root = write_emoji(tmp_path / "data", [entry("1F400", "one")])
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, 32:] = (200, 10, 30, 255)
    Image.fromarray(rgba, "RGBA").save(root / "img/google/64/1f400.png")
    image = load_emoji(root, 64, min_per_class=1).images_u8[0]
    assert image[:, 5, 5].tolist() == [255, 255, 255]
    assert image[:, 5, 60].tolist() == [200, 10, 30]
    assert load_emoji(root, 32, min_per_class=1).images_u8.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("break_it", ["missing", "no json", "no pictures"])
def test_missing_data_is_a_user_error_that_names_the_script(tmp_path, break_it):
    root = tmp_path / "data"
    if break_it != "missing":
        root.mkdir()
        (root / "emoji.json").write_text("[]" if break_it == "no pictures" else "{")
    with pytest.raises(UserError, match="emoji.json" if break_it == "no json" else "fetch_emoji"):
        load_emoji(root)
