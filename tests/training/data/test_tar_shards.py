from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from tests.training.data.pictures import CLASSES, encoded, members, picture, write_tar
from var_fast.errors import UserError
from var_fast.training.data import TarShards, open_images


def test_folder_of_shards(shard_folder):
    source = open_images(shard_folder, "train")
    assert len(source) == 9 and source.classes == CLASSES
    assert source.labels.tolist() == [i % 3 for i in range(9)]
    assert source.name(6) == f"{shard_folder}/train-001.tar:pic/0006"
    for i in (8, 0, 6):
        assert np.array_equal(source.read(i), picture(i))
    held_out = open_images(shard_folder, "val", classes=source.classes)
    assert held_out.labels.tolist() == [2, 0] and np.array_equal(held_out.read(1), picture(21))


@pytest.mark.parametrize("pattern", ["train-{000..001}.tar", "train-*.tar", "train-00{0,1}.tar", "train-00[01].tar"])
def test_patterns_are_the_training_split(shard_folder, pattern):
    source = open_images(f"{shard_folder}/{pattern}", "train")
    assert len(source) == 9 and source.classes == CLASSES
    assert source.fingerprint() == open_images(shard_folder, "train").fingerprint()
    assert open_images(f"{shard_folder}/{pattern}", "val") is None


def test_shards_in_a_folder_per_split(shard_folder):
    for split in ("train", "val"):
        (shard_folder / split).mkdir()
        for shard in shard_folder.glob(f"{split}-*.tar"):
            shard.rename(shard_folder / split / shard.name)
    source = open_images(shard_folder, "train")
    assert len(source) == 9 and source.classes == CLASSES
    assert len(open_images(shard_folder, "val", classes=CLASSES)) == 2


@pytest.mark.parametrize("kind, names", [("cls", ["0", "1", "2"]), ("txt", ["0", "1", "2"]), ("json", CLASSES)])
def test_kinds_of_labels(tmp_path, kind, names):
    source = TarShards([write_tar(tmp_path / "a.tar", members(1, 4, kind))])
    assert source.labels.tolist() == [1, 2, 0, 1] and source.classes == names


def test_keys_end_at_the_first_dot_and_cls_comes_first(tmp_path):
    content = {
        "a.b/0.left.png": encoded(picture(1)),
        "a.b/0.txt": b"a caption of 3 words",
        "a.b/0.cls": b"1",
        "a.b/0.json": b'{"label": 0}',
        "a.b/._0.png": b"what a Mac adds",
        "7.JPG": encoded(picture(2), "jpg"),
        "7.txt": b"2",
    }
    source = TarShards([write_tar(tmp_path / "a.tar", content)])
    assert [source.name(i).split(":")[1] for i in range(2)] == ["a.b/0", "7"]
    assert source.labels.tolist() == [1, 2]


def test_class_names_from_json(shard_folder):
    (shard_folder / "classes.txt").unlink()
    assert open_images(shard_folder, "train").classes == ["0", "1", "2"]
    (shard_folder / "classes.json").write_text(json.dumps(["x", "y", "z", "unused"]))
    assert open_images(shard_folder, "train").classes == ["x", "y", "z", "unused"]
    (shard_folder / "classes.json").write_text('{"x": 0}')
    with pytest.raises(UserError, match="classes.json holds no class names"):
        open_images(shard_folder, "train")
    (shard_folder / "classes.json").write_text('["x", "y"]')
    with pytest.raises(UserError, match="train-000.tar:pic/0002 has the class 2, expected one of 2"):
        open_images(shard_folder, "train")


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1024, 2000, -1024, -9000])
def test_cut_off_shards_are_named(shard_folder, keep):
    shard = shard_folder / "train-001.tar"
    whole = shard.read_bytes()
    # what follows the last member is padding: it must at least hold one empty block
    end = 512 * (max(i for i in range(len(whole) // 512) if any(whole[512 * i : 512 * i + 512])) + 1)
    shard.write_bytes(whole[: keep if keep >= 0 else end + keep])
    with pytest.raises(UserError, match="train-001.tar is no whole, uncompressed tar archive"):
        open_images(shard_folder, "train")
    shard.write_bytes(whole[:end])
    with pytest.raises(UserError, match="train-001.tar is no whole"):
        open_images(shard_folder, "train")
    shard.write_bytes(whole[: end + 512])
    assert len(open_images(shard_folder, "train")) == 9


def test_damaged_and_compressed_shards_are_named(shard_folder):
    shard = shard_folder / "train-001.tar"
    whole = bytearray(shard.read_bytes())
    second_header = whole.index(b"pic/0006.png")
    whole[second_header] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(UserError, match="train-001.tar is no whole"):
        open_images(shard_folder, "train")
    shard.write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match="train-001.tar is no whole, uncompressed"):
        open_images(shard_folder, "train")
    shard.unlink()
    shard.mkdir()
    with pytest.raises(UserError, match="cannot read shard .*train-001.tar: Is a directory"):
        open_images(shard_folder, "train")


@pytest.mark.parametrize(
    "content, words",
    [
        ({"0.png": b"x"}, "a.tar:0 has no label, expected one in 0.cls or 0.json"),
        ({"0.png": b"x", "0.txt": b"a caption"}, "a.tar:0 has no label"),
        ({"0.png": b"x", "0.jpg": b"x", "0.cls": b"1"}, "two pictures of the key '0'"),
        ({"0.png": b"x", "0.cls": b"-1"}, "a.tar:0.cls holds the label -1, expected 0 to"),
        ({"0.png": b"x", "0.cls": b"\xff\xfe"}, "a.tar:0.cls holds no label"),
        ({"0.png": b"x", "0.cls": "²".encode(), "1.png": b"", "1.cls": b"0"}, "numbers and names"),
        ({"0.png": b"x", "0.json": b"{"}, "a.tar:0.json holds no label"),
        ({"0.png": b"x", "0.json": b'{"label": [1]}'}, "a.tar:0.json holds no label"),
        ({"0.cls": b"1"}, "hold no pictures"),
    ],
)
def test_errors_name_the_member(tmp_path, content, words):
    with pytest.raises(UserError, match=words):
        TarShards([write_tar(tmp_path / "a.tar", content)])


def test_errors_of_patterns(shard_folder):
    with pytest.raises(UserError, match="train-002.tar does not exist"):
        open_images(f"{shard_folder}/train-{{000..002}}.tar", "train")
    with pytest.raises(UserError, match="has the range"):
        open_images(f"{shard_folder}/train-{{5..2}}.tar", "train")
    with pytest.raises(UserError, match="test-.*tar does not exist"):
        open_images(f"{shard_folder}/test-*.tar", "train")
    with pytest.raises(UserError, match="has the class 2, expected one of 2"):
        open_images(shard_folder, "val", classes=["a", "b"])


def test_shard_cut_off_after_it_was_opened_is_a_corrupt_picture(shard_folder):
    source = open_images(shard_folder, "train")
    (shard_folder / "train-001.tar").write_bytes(b"")
    with pytest.raises((OSError, ValueError)):
        source.read(7)
