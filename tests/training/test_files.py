from __future__ import annotations

import resource

import pytest
import torch

from var_fast.errors import UserError
from var_fast.training.files import contents_of, load_state, save_state, weights_hash, write_atomic


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "state"
    path.write_text("old")

    def half(part):
        part.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(UserError, match=r"cannot write .*state: disk full; what was saved before is intact"):
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


@pytest.mark.parametrize("entries", [1_000, 1_000_000])
def test_full_disk_is_a_user_error_that_names_the_file(tmp_path, entries):
    """A limit on the size of files stands for the full disk: writes fail in the same way."""
    path = tmp_path / "checkpoint.pt"
    save_state(path, {"kind": "tokenizer", "w": torch.arange(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*checkpoint\.pt: File too large; what was saved .* intact"):
            save_state(path, {"kind": "tokenizer", "w": torch.zeros(entries)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_state(path, "tokenizer")["w"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*checkpoint\.pt"):
        save_state(tmp_path / "file" / "checkpoint.pt", {})


def test_error_without_words_while_loading(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise EOFError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match="cannot read .*: EOFError"):
        load_state(tmp_path / "checkpoint.pt", "tokenizer")


@pytest.mark.parametrize("use", [lambda s: s["ema"], lambda s: int(**s), lambda s: torch.zeros(2).copy_(torch.ones(3))])
def test_other_contents_are_a_user_error(use):
    with pytest.raises(UserError, match="run/checkpoint.pt holds other entries"), contents_of("run/checkpoint.pt"):
        use({"other": 1})


def test_weights_hash_tells_values_names_and_types_but_not_layout():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 4, 3)
    ours = weights_hash(layer)
    assert weights_hash(layer.to(memory_format=torch.channels_last)) == ours
    assert weights_hash(torch.nn.Sequential(layer)) != ours
    with torch.no_grad():
        layer.bias[0] = torch.nextafter(layer.bias[0], torch.tensor(9.0))
    assert weights_hash(layer) != ours
