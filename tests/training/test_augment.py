from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.training.augment import _crop, random_flip, shift_zoom


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_flip_mirrors_some_and_leaves_others():
    img = torch.rand(32, 3, 4, 4)
    out = random_flip(img, generator(0))
    same = (out == img).flatten(1).all(1)
    mirrored = (out == img.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 4 < int(same.sum()) < 28


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 12), st.integers(0, 2), st.integers(0, 1000))
def test_crop_is_a_window_of_the_picture_on_white(side, margin, seed):
    """Every pixel that is not white is where it was, moved by one and the same distance of an allowed size."""
    size = 8
    place = torch.arange(side * side, dtype=torch.float32).view(1, 1, side, side).expand(2, 3, side, side) / 1000 - 0.9
    out = _crop(place, size, margin, generator(seed))
    assert out.shape == (2, 3, size, size)
    for picture in out[:, 0]:
        y, x = (picture < 1).nonzero(as_tuple=True)
        source = ((picture[y, x] + 0.9) * 1000).round().long()
        dy, dx = (source // side - y).unique(), (source % side - x).unique()
        assert dy.numel() == dx.numel() == 1
        low, high = min(0, side - size) - margin, max(0, side - size) + margin
        assert low <= int(dy) <= high and low <= int(dx) <= high


def test_shift_zoom_keeps_white_white_and_follows_the_seed():
    img = torch.rand(4, 3, 16, 16) * 2 - 1
    assert torch.equal(shift_zoom(img, 8, generator(1)), shift_zoom(img, 8, generator(1)))
    assert not torch.equal(shift_zoom(img, 8, generator(1)), shift_zoom(img, 8, generator(2)))
    white = shift_zoom(torch.ones(2, 3, 16, 16), 8, generator(3))
    torch.testing.assert_close(white, torch.ones(2, 3, 8, 8), rtol=0, atol=1e-6)
