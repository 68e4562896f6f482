from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.training.data.pictures import CLASSES, picture, write_folder
from var_fast.errors import UserError
from var_fast.training.data import open_images


def test_order_labels_and_pictures(image_folder):
    source = open_images(image_folder, "train")
    assert source.classes == CLASSES
    assert len(source) == 15
    assert source.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert source.name(0) == str(image_folder / "train/bird/00.png")
    assert source.name(6) == str(image_folder / "train/cat/deeper/01.png")
    assert np.array_equal(source.read(6), picture(101))
    held_out = open_images(image_folder, "val", classes=source.classes)
    assert len(held_out) == 6
    assert np.array_equal(held_out.read(5), picture(251))


def test_other_files_and_hidden_ones_are_no_pictures(image_folder):
    (image_folder / "train/bird/notes.txt").write_text("no picture")
    (image_folder / "train/bird/.hidden.png").write_text("no picture")
    (image_folder / "train/.cache").mkdir()
    (image_folder / "train/README").write_text("no class")
    (image_folder / "train/bird/zz.JPEG").write_bytes(b"")
    source = open_images(image_folder, "train")
    assert len(source) == 16 and source.name(5).endswith("zz.JPEG") and source.classes == CLASSES


def test_labels_of_val_are_those_of_train(image_folder):
    for file in (image_folder / "val/bird").iterdir():
        file.unlink()
    (image_folder / "val/bird").rmdir()
    assert open_images(image_folder, "val", classes=CLASSES).labels.tolist() == [1, 1, 2, 2]
    (image_folder / "val/zebra").mkdir()
    with pytest.raises(UserError, match=r"val has the class 'zebra', which the training images lack"):
        open_images(image_folder, "val", classes=CLASSES)


def test_pictures_become_rgb_on_white(tmp_path):
    folder = write_folder(tmp_path, 1, ["train"]) / "train" / "bird"
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(folder / "a.png")
    Image.new("L", (4, 4), 7).save(folder / "b.png")
    Image.new("LA", (4, 4), (9, 255)).save(folder / "c.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 1, 2, 3])
    palette.save(folder / "d.png", transparency=0)
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(folder / "e.jpg")
    source = open_images(tmp_path, "train")
    expected = [(255, 255, 255), (7, 7, 7), (9, 9, 9), (1, 2, 3), (255, 255, 255)]
    for i, colour in enumerate(expected, start=1):
        read = source.read(i)
        assert read.mode == "RGB" and read.getpixel((2, 2)) == colour, source.name(i)


def test_corrupt_pictures_raise(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, 1, ["train"]) / "train" / "bird"
    whole = (folder / "00.png").read_bytes()
    (folder / "01.png").write_bytes(whole[: len(whole) // 2])  # cut off
    (folder / "02.png").write_bytes(b"")
    (folder / "03.png").write_bytes(b"no picture")
    (folder / "04.png").write_bytes(whole[:60] + b"\0" * 40 + whole[100:])
    Image.new("RGB", (100, 100)).save(folder / "05.png")  # larger than Pillow's limit, see below
    jpeg = folder / "06.jpg"
    picture(1, 64, 64).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-300])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_000)
    source = open_images(tmp_path, "train")
    source.read(0)
    for i in range(1, 7):
        with pytest.raises((OSError, ValueError)):
            source.read(i)


def test_errors_say_what_is_expected(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist, expected a folder of images or tar shards"):
        open_images(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"holds no training images: expected train/<class>/\*.png, train-\*.tar"):
        open_images(tmp_path, "train")
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match=r"its folders \(cat\) belong below train/"):
        open_images(tmp_path, "train")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"train/cat holds no pictures"):
        open_images(tmp_path, "train")
    (tmp_path / "train" / "cat").rmdir()
    with pytest.raises(UserError, match="expected train/<class>"):
        open_images(tmp_path, "train")
    assert open_images(write_folder(tmp_path / "other", 1, ["train"]), "val") is None


def test_fingerprint_tells_names_and_labels_but_not_the_place(tmp_path):
    a = open_images(write_folder(tmp_path / "a"), "train").fingerprint()
    b = write_folder(tmp_path / "b")
    assert open_images(b, "train").fingerprint() == a
    (b / "train/dog/04.png").rename(b / "train/dog/05.png")
    assert open_images(b, "train").fingerprint() != a
    (b / "train/dog/05.png").rename(b / "train/cat/04.png")
    assert open_images(b, "train").fingerprint() != a
