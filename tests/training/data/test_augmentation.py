from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.training.data.pictures import picture
from var_fast.errors import UserError
from var_fast.training.data import Augmentation, to_float


def whole_then_cut(image: Image.Image, size: int, short: int) -> torch.Tensor:
    """(3, H, W): the enlarged picture, all of it."""
    width, height = image.size
    new = (short, short * height // width) if width <= height else (short * width // height, short)
    return torch.from_numpy(np.array(image.resize(new, Image.Resampling.LANCZOS))).permute(2, 0, 1)


sides = st.integers(1, 60)


@given(width=sides, height=sides, size=st.integers(1, 24), enlarge=st.sampled_from([1.0, 1.125, 1.7]))
@settings(max_examples=40, deadline=None)
def test_centre_is_the_middle_of_the_enlarged_picture(width, height, size, enlarge):
    # far from black and white, where Lanczos overshoots, and what is cut off depends on which axis comes first
    image = picture(width * 100 + height, width, height).point(lambda level: 96 + level // 4)
    found = Augmentation(size, enlarge).centre(image)
    whole = whole_then_cut(image, size, round(enlarge * size))
    top, left = (round((side - size) / 2) for side in whole.shape[1:])
    expected = whole[:, top : top + size, left : left + size]
    assert found.shape == (3, size, size) and found.dtype == torch.uint8
    # Pillow takes the axes in the order that is cheaper, and rounds to whole levels in between
    assert (found.int() - expected.int()).abs().max() <= 2


def test_picture_of_the_right_size_is_left_alone():
    image = picture(0, 16, 16)
    assert np.array_equal(Augmentation(16, 1.0).centre(image).permute(1, 2, 0).numpy(), np.array(image))


@pytest.mark.parametrize("shape", [(30, 18), (18, 30), (20, 20)])
def test_random_windows_are_windows_and_every_place_comes(shape):
    image = picture(3, *shape).point(lambda level: 32 + level * 3 // 4)
    augmentation = Augmentation(16, 1.125, flip=True)
    whole = whole_then_cut(image, 16, 18).int()
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(400):
        found = augmentation.random(image, generator).int()
        places = [
            (mirrored, top, left)
            for mirrored in (False, True)
            for top in range(whole.shape[1] - 15)
            for left in range(whole.shape[2] - 15)
            if (found.flip(-1) if mirrored else found).sub(whole[:, top : top + 16, left : left + 16]).abs().max() <= 2
        ]
        assert len(places) == 1
        seen.update(places)
    rows, columns = whole.shape[1] - 15, whole.shape[2] - 15
    assert len(seen) > 0.95 * 2 * rows * columns
    assert {row for _, row, _ in seen} == set(range(rows)) and {column for *_, column in seen} == set(range(columns))


def test_a_generator_in_one_state_gives_one_window():
    image, augmentation = picture(1), Augmentation(8)
    one, other = (augmentation.random(image, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other)
    plain = Augmentation(8, flip=False)
    windows = [plain.random(image, torch.Generator().manual_seed(s)) for s in range(40)]
    assert not any(torch.equal(a, Augmentation(8, flip=True).centre(image).flip(-1)) for a in windows)


def test_a_very_long_picture_costs_little():
    """Enlarged as a whole it would be 64 x 4,000,000 pixels."""
    found = Augmentation(64, 1.0).centre(Image.new("RGB", (62_500, 1), (9, 8, 7)))
    assert found.shape == (3, 64, 64) and found[:, 0, 0].tolist() == [9, 8, 7]


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="size: got 0"):
        Augmentation(0)
    for enlarge in (0.5, float("nan"), 100.0):
        with pytest.raises(UserError, match="enlarge: got"):
            Augmentation(8, enlarge)


def test_to_float_spans_minus_one_to_one():
    levels = torch.tensor([0, 255, 51], dtype=torch.uint8)
    assert torch.allclose(to_float(levels), torch.tensor([-1.0, 1.0, -0.6]), atol=1e-7)
    assert levels.dtype == torch.uint8
