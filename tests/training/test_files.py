from __future__ import annotations

import pytest
import torch

from var_fast.errors import UserError
from var_fast.training.files import load_state, save_state, write_atomic


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "state"
    path.write_text("old")

    def half(part):
        part.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, half)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_write_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "state"
    for text in ("one", "two"):
        write_atomic(path, lambda part, text=text: part.write_text(text))
        assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["state"]


def test_state_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_state(path, {"kind": "tokenizer", "w": torch.arange(3)})
    assert load_state(path, "tokenizer")["w"].tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="'tokenizer', expected 'transformer'"):
        load_state(path, "transformer")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot read .*checkpoint.pt"):
        load_state(path, "tokenizer")
    with pytest.raises(UserError, match="does not exist"):
        load_state(tmp_path / "none.pt", "tokenizer")
