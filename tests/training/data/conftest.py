"""Fixtures: the small pictures in both layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.data.pictures import CLASSES, members, write_folder, write_tar


@pytest.fixture
def image_folder(tmp_path) -> Path:
    return write_folder(tmp_path / "pictures")


@pytest.fixture
def shard_folder(tmp_path) -> Path:
    """Two training shards (5 and 4 pictures) and one of validation (2), class names in classes.txt."""
    root = tmp_path / "shards"
    write_tar(root / "train-000.tar", members(0, 5))
    write_tar(root / "train-001.tar", members(5, 4))
    write_tar(root / "val-000.tar", members(20, 2))
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root
