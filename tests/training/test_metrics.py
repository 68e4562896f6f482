from __future__ import annotations

import math

import pytest
import torch

from var_fast.training.metrics import psnr_B, split_scales, unigram_baseline


def test_psnr_is_per_picture():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    torch.testing.assert_close(psnr_B(a, b), torch.tensor([20.0, 40.0]))


def test_split_scales():
    parts = split_scales(torch.arange(10, dtype=torch.int16).view(2, 5), (1, 2))
    assert [p.tolist() for p in parts] == [[[0], [5]], [[1, 2, 3, 4], [6, 7, 8, 9]]]
    assert parts[0].dtype == torch.int64


def test_unigram_by_hand():
    """Vocabulary of 3. Scale 0: counts 2, 0, 1, so with one added p = 3/6, 1/6, 2/6. Scale 1: counts 0, 12, 0."""
    train = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [2, 1, 1, 1, 1]])
    held = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    base = unigram_baseline(train, held, (1, 2), 3)
    assert base["loss"][0] == pytest.approx(-(math.log(1 / 2) + math.log(1 / 6)) / 2)
    assert base["loss"][1] == pytest.approx(-(7 * math.log(13 / 15) + math.log(1 / 15)) / 8)
    assert base["accuracy_percent"] == pytest.approx([50.0, 87.5])
