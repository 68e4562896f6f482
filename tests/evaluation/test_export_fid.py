"""export_fid with a tiny model: what is in the file, parts, interruptions, refusals."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from tests.cli_util import SIZE
from var_fast import VAR, Sampler
from var_fast.errors import UserError
from var_fast.evaluation import export_fid as module
from var_fast.evaluation.export_fid import export_fid, image_seed, parts_folder, to_uint8

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = dict(cfg=2.0, top_k=8, top_p=0.9)


@pytest.fixture(scope="module")
def var(model) -> VAR:
    return VAR.from_pretrained(model)


@pytest.fixture
def sampler(var) -> Sampler:
    return Sampler(var, dtype="float32", max_batch=3)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART_IMAGES", 4)  # whole batches: 6 images, of 3


@pytest.fixture(scope="module")
def whole(var, tmp_path_factory) -> bytes:
    """The file of 5 images of each of 4 classes, in one go."""
    out = tmp_path_factory.mktemp("whole") / "whole.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_IMAGES", 4)
        assert export_fid(Sampler(var, dtype="float32", max_batch=3), out, per_class=5, **OPTIONS) == (20, 0, 0)
    return out.read_bytes()


def test_holds_the_samplers_images_in_the_order_of_classes(var, tmp_path):
    told = []
    sampler = Sampler(var, dtype="float32", max_batch=3)
    export_fid(sampler, tmp_path / "a.npz", per_class=5, seed=7, **OPTIONS, advance=told.append)
    found = np.load(tmp_path / "a.npz", allow_pickle=False)["arr_0"]
    assert found.shape == (20, SIZE, SIZE, 3) and found.dtype == np.uint8
    labels = [label for label in range(4) for _ in range(5)]
    # all in one batch here, in batches of 3 there
    expected = Sampler(var, dtype="float32").sample(labels, [7 * 2**32 + i for i in range(20)], **OPTIONS)
    np.testing.assert_array_equal(found, expected.mul(255).round().byte().permute(0, 2, 3, 1).numpy())
    assert len(np.unique(found.reshape(20, -1), axis=0)) == 20, "no image twice"
    assert told == [0, 6, 6, 6, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_interleaved_every_class_is_in_every_stretch(var, sampler, tmp_path, whole):
    export_fid(sampler, tmp_path / "a.npz", per_class=3, seed=7, interleave=True, **OPTIONS)
    found = np.load(tmp_path / "a.npz", allow_pickle=False)["arr_0"]
    expected = Sampler(var, dtype="float32").sample([0, 1, 2, 3] * 3, [7 * 2**32 + i for i in range(12)], **OPTIONS)
    np.testing.assert_array_equal(found, expected.mul(255).round().byte().permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match="interleave"):
        export_fid(sampler, tmp_path / "a.npz", per_class=3, seed=7, **OPTIONS)


def test_seeds_and_levels():
    assert [image_seed(0, 7), image_seed(2, 7), image_seed(2**31 - 1, 2**32 - 1)] == [7, 2**33 + 7, 2**63 - 1]
    levels = torch.arange(256).float().div(255)
    image = (
        torch.cat([levels - 0.49 / 255, levels + 0.49 / 255]).clamp(-0.1, 1.1).view(1, 1, 2, 256).expand(1, 3, 2, 256)
    )
    expected = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, None, :, None], (1, 2, 256, 3))
    np.testing.assert_array_equal(to_uint8(image), expected)
    with pytest.raises(UserError, match="not finite"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))


class Stop(KeyboardInterrupt):
    pass


def interrupt_after(count: int):
    """An `advance` that is interrupted once `count` images are there."""
    done = 0

    def advance(images):
        nonlocal done
        done += images
        if done >= count:
            raise Stop

    return advance


def test_goes_on_where_it_was(sampler, tmp_path, whole):
    out = tmp_path / "a.npz"
    for count in (6, 12):
        with pytest.raises(Stop):
            export_fid(sampler, out, per_class=5, **OPTIONS, advance=interrupt_after(count))
        assert not out.exists() and len(list(parts_folder(out).glob("part-*.npz"))) == count // 6
    times = {p.name: p.stat().st_mtime_ns for p in parts_folder(out).iterdir()}
    (parts_folder(out) / ".part-00003.npz.77.part").write_bytes(b"half of a part")
    told = []

    def advance(images):
        told.append(images)
        if images == 12:
            assert {p.name: p.stat().st_mtime_ns for p in parts_folder(out).iterdir()} == times, "kept, not made again"

    assert export_fid(sampler, out, per_class=5, **OPTIONS, advance=advance) == (20, 12, 0)
    assert told == [12, 6, 2]
    assert out.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "removed"])
def test_damaged_parts_are_made_again(sampler, tmp_path, whole, damage):
    out = tmp_path / "a.npz"
    with pytest.raises(Stop):
        export_fid(sampler, out, per_class=5, **OPTIONS, advance=interrupt_after(20))
    part = parts_folder(out) / "part-00001.npz"
    data = bytearray(part.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    part.write_bytes(data[: {"flipped": None, "cut": -30}.get(damage, 0)])
    if damage == "removed":
        part.unlink()
    assert export_fid(sampler, out, per_class=5, **OPTIONS) == (20, 14, 0 if damage == "removed" else 1)
    assert out.read_bytes() == whole


def test_a_whole_file_is_left_alone(sampler, tmp_path, whole, monkeypatch):
    out = tmp_path / "a.npz"
    out.write_bytes(whole)
    parts_folder(out).mkdir()  # left over by a crash between the last two steps
    (parts_folder(out) / "settings.json").write_text("{}")
    monkeypatch.setattr(Sampler, "sample", None)
    assert export_fid(sampler, out, per_class=5, **OPTIONS) == (20, 20, 0)
    assert out.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_another_file_is_not_replaced(sampler, tmp_path, whole):
    out = tmp_path / "a.npz"
    for content in (whole, b"mine"):
        out.write_bytes(content)
        with pytest.raises(UserError, match="exists and was not made with these settings"):
            export_fid(sampler, out, per_class=5, **OPTIONS, seed=1)
        assert out.read_bytes() == content
    assert export_fid(sampler, out, per_class=5, **OPTIONS, restart=True) == (20, 0, 0)
    assert out.read_bytes() == whole


def test_parts_of_other_settings_are_refused(var, sampler, tmp_path, whole):
    out = tmp_path / "a.npz"
    with pytest.raises(Stop):
        export_fid(sampler, out, per_class=5, **OPTIONS, advance=interrupt_after(6))
    before = {p.name: p.read_bytes() for p in parts_folder(out).iterdir()}
    with pytest.raises(
        UserError, match=r"begun with cfg 2.0 \(now 3.0\), seed 0 \(now 1\); give the same, or --restart"
    ):
        export_fid(sampler, out, per_class=5, **{**OPTIONS, "cfg": 3.0}, seed=1)
    with pytest.raises(UserError, match=r"batch 3 \(now 4\)"):
        export_fid(Sampler(var, dtype="float32", max_batch=4), out, per_class=5, **OPTIONS)
    with pytest.raises(UserError, match=r"dtype float32 \(now bfloat16\)"):
        export_fid(Sampler(var, dtype="bfloat16", max_batch=3), out, per_class=5, **OPTIONS)
    weight, kept = var.head.weight.data, var.head.weight[0, 0].clone()
    weight[0, 0] += 1
    try:
        with pytest.raises(UserError, match="other weights of the model"):
            export_fid(Sampler(var, dtype="float32", max_batch=3), out, per_class=5, **OPTIONS)
    finally:
        weight[0, 0] = kept
    for text in ("{", "[]", None):
        settings = parts_folder(out) / "settings.json"
        settings.unlink() if text is None else settings.write_text(text)
        with pytest.raises(UserError, match="--restart begins anew"):
            export_fid(sampler, out, per_class=5, **OPTIONS)
    (parts_folder(out) / "settings.json").write_bytes(before["settings.json"])
    assert {p.name: p.read_bytes() for p in parts_folder(out).iterdir()} == before, "refused, and nothing lost"
    assert export_fid(sampler, out, per_class=5, **OPTIONS, restart=True).found == 0
    assert out.read_bytes() == whole


def test_restart_removes_only_its_own(sampler, tmp_path):
    out = tmp_path / "a.npz"
    parts_folder(out).mkdir()
    (parts_folder(out) / "notes.txt").write_text("mine")
    export_fid(sampler, out, per_class=1, **OPTIONS, restart=True)
    assert [p.name for p in parts_folder(out).iterdir()] == ["notes.txt"]


def test_a_full_disk(sampler, tmp_path, whole, monkeypatch):
    out, usage = tmp_path / "a.npz", namedtuple("usage", "total used free")
    need = 2 * 20 * SIZE * SIZE * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, need - 1))
    with pytest.raises(UserError, match="needs 0.00 GB of free disk space, parts and result"):
        export_fid(sampler, out, per_class=5, **OPTIONS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, need))
    write, calls = module.write_npz, 0

    def full(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3:
            arguments[0].write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(module, "write_npz", full)
    with pytest.raises(UserError, match="cannot write .*part-00002.npz: No space left on device"):
        export_fid(sampler, out, per_class=5, **OPTIONS)
    assert sorted(p.name for p in parts_folder(out).iterdir()) == ["part-00000.npz", "part-00001.npz", "settings.json"]
    assert export_fid(sampler, out, per_class=5, **OPTIONS).found == 12
    assert out.read_bytes() == whole


def test_a_disk_that_fills_at_the_end(sampler, tmp_path, whole, monkeypatch):
    out, write = tmp_path / "a.npz", module.write_npz

    def full(path, shape, *rest):
        if shape[0] == 20:
            raise OSError(28, "No space left on device")
        write(path, shape, *rest)

    monkeypatch.setattr(module, "write_npz", full)
    with pytest.raises(UserError, match="No space left on device"):
        export_fid(sampler, out, per_class=5, **OPTIONS)
    monkeypatch.setattr(module, "write_npz", write)
    assert export_fid(sampler, out, per_class=5, **OPTIONS) == (20, 20, 0)
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(out="a.png"), "expected a name that ends in .npz"),
        (dict(out="nowhere/a.npz"), "there is no directory"),
        (dict(per_class=0), "per_class is 0, expected at least 1"),
        (dict(per_class=2**31), "per_class is 2147483648, expected at most 1073741824"),
        (dict(seed=-1), "seed is -1, expected 0 to"),
        (dict(seed=2**31), "seed is 2147483648, expected 0 to"),
        (dict(cfg=float("nan")), "cfg"),
        (dict(top_p=2.0), "top_p"),
    ],
)
def test_refuses(sampler, folder, changes, words):
    arguments = {"out": "a.npz", **OPTIONS, **changes}
    with pytest.raises(UserError, match=words):
        export_fid(sampler, arguments.pop("out"), **arguments)
    assert list(folder.iterdir()) == []


def test_settings_are_kept_in_the_file(whole, tmp_path):
    (tmp_path / "a.npz").write_bytes(whole)
    told = json.loads(module.read_comment(tmp_path / "a.npz"))["var_fast export-fid"]
    assert told["per_class"] == 5 and told["cfg"] == 2.0 and told["dtype"] == "float32" and len(told["weights"]) == 129
