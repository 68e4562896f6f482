from __future__ import annotations

import resource

import pytest
import torch

from var_fast.errors import UserError
from var_fast.training.files import contents_of, replace_folder, save_state, weights_hash, write_atomic


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


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"

    def fill(part, text="new"):
        (part / "a").write_text(text)

    def half(part):
        fill(part, "half")
        raise OSError("disk full")

    replace_folder(folder, lambda part: fill(part, "old"))
    with pytest.raises(UserError, match=r"cannot write .*model: disk full; what was saved before is intact"):
        replace_folder(folder, half)
    assert (folder / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model"]
    folder.rename(tmp_path / ".model.old")  # a crash between the two renames
    with pytest.raises(UserError):
        replace_folder(folder, half)
    assert (folder / "a").read_text() == "old"
    replace_folder(folder, fill)
    assert (folder / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["model"]


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
    assert torch.load(path, weights_only=True)["w"].tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*checkpoint\.pt"):
        save_state(tmp_path / "file" / "checkpoint.pt", {})


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
