"""scripts/fetch_emoji.py: what it takes out of a package, and its errors in one line."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

from var_fast.training.data import open_images
from var_fast.training.emoji import load_emoji

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_emoji.py"


def fetch(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=environment or None
    )


def write_tarball(path, names, folder=None):
    """Members of two bytes and, below package/, the files of `folder`."""
    with tarfile.open(path, "w:gz") as archive:
        if folder is not None:
            archive.add(folder, "package")
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2
            archive.addfile(member, io.BytesIO(b"[]"))


def names(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_only_what_is_needed_is_extracted(tmp_path, emoji_folder):
    others = ["package/img/google/sheets/a.png", "package/index.js", "package/img/google/64/../../../../../evil.png"]
    write_tarball(tmp_path / "p.tgz", others, emoji_folder)
    done = fetch("--from-tarball", tmp_path / "p.tgz", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "59 pictures in" in done.stdout
    extracted = [name for name in names(tmp_path / "out") if not name.startswith(("train/", "val/"))]
    assert extracted == names(emoji_folder)
    assert not list(tmp_path.rglob("evil.png"))


def test_pictures_by_class_are_images_to_train_on(tmp_path, emoji_folder):
    write_tarball(tmp_path / "p.tgz", [], emoji_folder)
    for _ in range(2):  # a second run changes nothing
        done = fetch("--from-tarball", tmp_path / "p.tgz", "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        known = load_emoji(emoji_folder, 64)
        train = open_images(tmp_path / "out", "train")
        val = open_images(tmp_path / "out", "val", classes=train.classes)
        assert train.classes == known.classes == ["animal", "shape"]  # "rare" has three pictures only
        assert len(val) == int(known.held_out.sum()) and len(train) + len(val) == len(known.names)
        for source, held_out in ((train, False), (val, True)):
            for i in range(len(source)):
                place = known.names.index(Path(source.name(i)).stem)
                assert bool(known.held_out[place]) == held_out
                assert int(source.labels[i]) == int(known.labels[place])
                pixels = torch.from_numpy(np.array(source.read(i))).permute(2, 0, 1)
                assert torch.equal(pixels, known.images_u8[place])


def test_without_pillow_the_rest_is_kept_and_what_to_install_is_said(tmp_path, emoji_folder):
    write_tarball(tmp_path / "p.tgz", [], emoji_folder)
    (tmp_path / "PIL.py").write_text("raise ModuleNotFoundError('no PIL', name='PIL')")
    done = fetch("--from-tarball", tmp_path / "p.tgz", "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "need the module PIL: pip install torch numpy Pillow" in done.stderr
    assert names(tmp_path / "out") == names(emoji_folder)


def test_errors_are_one_line(tmp_path):
    (tmp_path / "broken.tgz").write_bytes(b"no tarball")
    write_tarball(tmp_path / "empty.tgz", ["package/index.js"])
    for done in (
        fetch("--from-tarball", tmp_path / "absent.tgz", "--out", tmp_path / "out"),
        fetch("--from-tarball", tmp_path / "broken.tgz", "--out", tmp_path / "out"),
        fetch("--from-tarball", tmp_path / "empty.tgz", "--out", tmp_path / "out"),
        fetch("--out", tmp_path / "out", PATH=str(tmp_path)),  # no npm there
    ):
        assert done.returncode == 1
        assert done.stderr.startswith("fetch_emoji: ") and done.stderr.count("\n") == 1, done.stderr
