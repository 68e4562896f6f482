"""The cache holds what the tokenizer says, ends in the same bytes however it came about, and is checked when opened."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.training.data.pictures import CLASSES, write_folder
from tests.training.token_cache_util import files, tiny_vae
from var_fast.checkpoint import save_checkpoint
from var_fast.errors import UserError
from var_fast.training.data import Augmentation, open_images, to_float
from var_fast.training.files import weights_hash
from var_fast.training.order import batch_positions, examples_at
from var_fast.training.ranks import Ranks
from var_fast.training.token_cache import CacheBatches, TokenCache, token_dtype
from var_fast.training.write_token_cache import write_token_cache

OPTIONS = dict(crops=3, flips=True, batch=8, shard_images=4, seed=5)
ROOT = Path(__file__).parents[2]

# Writes the cache of argv: DATA OUT MODEL, slowly.
SCRIPT = f"""
import sys, time
from var_fast.checkpoint import load_checkpoint
from var_fast.training.write_token_cache import write_token_cache
data, out, model = sys.argv[1:]
vae = load_checkpoint(model).vae
encode = vae.img_to_idxBl
def slowly(images):
    time.sleep(0.1)
    return encode(images)
vae.img_to_idxBl = slowly
write_token_cache(data, out, vae, **{OPTIONS!r})
"""


@pytest.fixture(scope="module", autouse=True)
def few_threads(one_thread):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """15 pictures to train on, one of them corrupt, and 6 others."""
    root = write_folder(tmp_path_factory.mktemp("pictures"))
    (root / "train/cat/deeper/02.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The cache as one run makes it."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    write_token_cache(data, out, tiny_vae(), **OPTIONS)
    return out


@pytest.fixture
def cache(whole, tmp_path) -> Path:
    """A copy of the cache, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


def edit_index(cache: Path, change) -> None:
    index = json.loads((cache / "index.json").read_text())
    change(index)
    (cache / "index.json").write_text(json.dumps(index))


def test_tokens_are_those_of_the_tokenizer(data, whole):
    opened = TokenCache.open(whole)
    vae = tiny_vae()
    assert opened.tokenizer_hash == weights_hash(vae) == weights_hash(opened.tokenizer())
    assert (opened.patch_nums, opened.vocab_size, opened.size, opened.views) == ((1, 2, 4), 16, 8, 6)
    assert opened.classes == CLASSES
    for name, views in (("train", 6), ("val", 1)):
        source = open_images(data, name)
        good = [i for i in range(len(source)) if "cat/deeper/02" not in source.name(i) or name == "val"]
        split = opened.split(name)
        assert (len(split), split.views) == (len(good), views)
        assert torch.equal(split.labels, source.labels[good])
        centres_B3HW = torch.stack([Augmentation(8).centre(source.read(i)) for i in good])
        expected_BL = torch.cat(vae.img_to_idxBl(to_float(centres_B3HW)), dim=1)
        assert torch.equal(split.tokens(range(len(split)), [0] * len(split)), expected_BL)
        if name == "train":
            expected_BL = torch.cat(vae.img_to_idxBl(to_float(centres_B3HW.flip(-1))), dim=1)
            assert torch.equal(split.tokens(range(len(split)), [3] * len(split)), expected_BL)


def test_files_are_plain_arrays_in_the_order_of_the_images(whole):
    index = json.loads((whole / "index.json").read_text())
    assert [shard["images"] for shard in index["splits"]["train"]["shards"]] == [4, 3, 4, 3]
    assert [name[-len("cat/deeper/02.png") :] for name in index["splits"]["train"]["skipped"]] == ["cat/deeper/02.png"]
    tokens = np.load(whole / "train-00001.tokens.npy", mmap_mode="r")
    assert tokens.dtype == np.uint16 and tokens.shape == (3, 6, 21)
    labels = np.load(whole / "train-00001.labels.npy")
    assert labels.dtype == np.int32 and labels.tolist() == [0, 1, 1]
    split = TokenCache.open(whole).split("train")
    found = split.tokens([6, 4, 13, 4], [5, 0, 1, 2])
    assert found.dtype == torch.int64
    assert found[[0, 1, 3]].tolist() == tokens[[2, 0, 0], [5, 0, 2]].tolist()
    assert found[2].tolist() == np.load(whole / "train-00003.tokens.npy")[2, 1].tolist()
    with pytest.raises(IndexError):
        split.tokens([14], [0])
    assert token_dtype(1 << 16) == np.uint16 and token_dtype((1 << 16) + 1) == np.uint32


def test_random_windows_differ_and_follow_the_seed(data, whole, tmp_path):
    every = np.concatenate([np.load(path) for path in sorted(whole.glob("train-*.tokens.npy"))])
    for view in range(1, 6):
        assert (every[:, 0] != every[:, view]).any()
    write_token_cache(data, tmp_path / "other", tiny_vae(), **{**OPTIONS, "seed": 6})
    other = np.load(tmp_path / "other/train-00000.tokens.npy")
    assert np.array_equal(other[:, [0, 3]], every[:4, [0, 3]]) and not np.array_equal(other, every[:4])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_byte(data, whole, tmp_path, workers):
    write_token_cache(data, tmp_path / "cache", tiny_vae(), workers=workers, **OPTIONS)
    assert files(tmp_path / "cache") == files(whole)


def test_a_killed_run_goes_on_to_the_same_bytes(data, whole, tmp_path):
    out = tmp_path / "cache"
    save_checkpoint(tmp_path / "model", tiny_vae())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, data, out, tmp_path / "model"], env=environment)
    deadline = time.monotonic() + 60
    while not (out / "train-00001.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match=r"cache is not finished: run the same `var-fast tokenize` again"):
        TokenCache.open(out)
    done = {name: (out / name).stat().st_mtime_ns for name in ("train-00000.tokens.npy", "train-00001.json")}
    (out / ".train-00002.tokens.npy.99.part").write_bytes(b"half")  # as the kill may leave
    summary = write_token_cache(data, out, tiny_vae(), **OPTIONS)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
    assert 0 < summary.encoded <= 13
    assert files(out) == files(whole)


def test_a_finished_cache_is_left_as_it_is_and_a_damaged_shard_is_made_anew(data, whole, cache):
    summary = write_token_cache(data, cache, tiny_vae(), **OPTIONS)
    assert summary.encoded == 0 and files(cache) == files(whole)
    assert summary.images == {"train": 14, "val": 6} and summary.sequences == 14 * 6 + 6
    assert len(summary.skipped) == 1 and summary.bytes == sum(len(b) for n, b in files(cache).items() if "npy" in n)
    (cache / "train-00002.tokens.npy").write_bytes(b"damaged")
    (cache / "val-00000.json").unlink()
    summary = write_token_cache(data, cache, tiny_vae(), **OPTIONS)
    assert summary.encoded == 8 and files(cache) == files(whole)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"crops": 2}, "begun with crops 3, now 2"),
        ({"flips": False}, "begun with flips True, now False"),
        ({"enlarge": 1.5}, "begun with enlarge 1.125, now 1.5"),
        ({"batch": 4}, "begun with batch 8, now 4"),
        ({"vae": tiny_vae(1)}, "begun with another tokenizer"),
    ],
)
def test_other_settings_are_refused_until_restart(data, cache, change, words):
    before = files(cache)
    options = {"vae": tiny_vae(), **OPTIONS, **change}
    with pytest.raises(UserError, match=f"{words}.*--restart begins anew"):
        write_token_cache(data, cache, **options)
    assert files(cache) == before
    write_token_cache(data, cache, restart=True, **options)
    assert TokenCache.open(cache).tokenizer_hash == weights_hash(options["vae"])
    write_token_cache(data, cache.parent / "fresh", **options)
    assert files(cache) == files(cache.parent / "fresh")


def test_other_images_are_refused(cache, tmp_path):
    data = write_folder(tmp_path / "others", 4)
    with pytest.raises(UserError, match="begun with other images or classes than .*others has now"):
        write_token_cache(data, cache, tiny_vae(), **OPTIONS)


def test_a_folder_with_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(UserError, match="work is there and holds no token cache, expected a new or empty folder"):
            write_token_cache(data, tmp_path / "work", tiny_vae(), restart=restart)
    assert files(tmp_path / "work") == {"thesis.txt": b"mine"}
    with pytest.raises(UserError, match="holds no token cache"):
        write_token_cache(data, tmp_path / "work/thesis.txt", tiny_vae())
    with pytest.raises(UserError, match="crops: got 0"):
        write_token_cache(data, tmp_path / "new", tiny_vae(), crops=0)
    assert not (tmp_path / "new").exists()


def test_restart_removes_nothing_but_the_cache(data, cache):
    (cache / "notes.txt").write_text("mine")
    write_token_cache(data, cache, tiny_vae(), restart=True, batch=4)
    assert (cache / "notes.txt").read_text() == "mine"
    assert not (cache / "train-00001.json").exists()


def test_full_disk_is_one_line_and_loses_no_shard(data, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(UserError, match="cache needs 0 MB for the tokens, but 0 MB are free"):
            write_token_cache(data, tmp_path / "cache", tiny_vae(), **OPTIONS)
    write_token_cache(data, tmp_path / "cache", tiny_vae(), **OPTIONS)
    for path in [*(tmp_path / "cache").glob("*0000[23].*"), tmp_path / "cache/index.json"]:
        path.unlink()
    kept = files(tmp_path / "cache")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # smaller than a shard and than the settings
    try:
        with pytest.raises(UserError, match="cannot write .*File too large; what was saved before is intact"):
            write_token_cache(data, tmp_path / "cache", tiny_vae(), **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept.items() <= files(tmp_path / "cache").items()
    write_token_cache(data, tmp_path / "cache", tiny_vae(), **OPTIONS)
    assert files(tmp_path / "cache") == files(whole)


def test_no_readable_image_is_one_line(tmp_path):
    data = write_folder(tmp_path / "data", 1)
    for path in (data / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no image of val in .*data can be read"):
        write_token_cache(data, tmp_path / "cache", tiny_vae())


def test_shard_without_a_readable_image(tmp_path):
    data = write_folder(tmp_path / "data", 2, ["train"])
    for path in (data / "train/cat").rglob("*.png"):
        path.write_bytes(b"")
    summary = write_token_cache(data, tmp_path / "cache", tiny_vae(), shard_images=2)
    assert summary.images == {"train": 4} and len(summary.skipped) == 2
    opened = TokenCache.open(tmp_path / "cache")
    assert opened.split("val") is None and opened.split("train").labels.tolist() == [0, 0, 2, 2]
    assert (
        opened.split("train").tokens([2], [0]).tolist()[0]
        == np.load(tmp_path / "cache/train-00002.tokens.npy")[0, 0].tolist()
    )


def test_progress_is_shown_with_the_time_left(data, tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    write_token_cache(data, tmp_path / "cache", tiny_vae(), console=console)
    assert re.search(r"tokenizing.*21/21.*0:00:00", screen.getvalue())


# -------------------------------------------------------------------------------------------------------------- opening
def test_no_cache_is_a_user_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"holds no token cache, expected a folder that `var-fast tokenize` made"):
            TokenCache.open(path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*index.json"):
        TokenCache.open(tmp_path)
    (tmp_path / "index.json").write_text('{"kind": "else"}')
    with pytest.raises(UserError, match="index.json is no index of a token cache"):
        TokenCache.open(tmp_path)


@pytest.mark.parametrize("name", ["train-00001.tokens.npy", "train-00003.labels.npy", "val-00000.tokens.npy"])
def test_damage_is_found_and_named(cache, name):
    content = bytearray((cache / name).read_bytes())
    content[-4] ^= 2
    (cache / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged: its checksum is"):
        TokenCache.open(cache)
    TokenCache.open(cache, verify=False)
    (cache / name).write_bytes(content[:-4])
    for verify in (True, False):
        with pytest.raises(UserError, match=name):
            TokenCache.open(cache, verify=verify)
    np.save(cache / name, np.zeros((3, 3)))
    with pytest.raises(UserError, match=rf"{name} holds float64 \(3, 3\), expected"):
        TokenCache.open(cache, verify=False)
    for content in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O'}\n"):
        (cache / name).write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            TokenCache.open(cache, verify=False)
    np.save(cache / name, np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        TokenCache.open(cache, verify=False)
    (cache / name).unlink()
    for verify in (True, False):
        with pytest.raises(UserError, match=f"cannot read .*{name}: No such file"):
            TokenCache.open(cache, verify=verify)


def test_labels_and_tokens_out_of_range(cache):
    """In a cache whose checksums fit: they protect from accidents, not from malice."""
    path = cache / "train-00000.labels.npy"
    labels = np.load(path)
    for bad in (-1, 3):
        np.save(path, np.where(np.arange(4) == 2, bad, labels).astype(np.int32))
        with pytest.raises(UserError, match="train-00000.labels.npy has labels out of range, expected 0 to 2"):
            TokenCache.open(cache, verify=False)
    np.save(path, labels)
    path = cache / "train-00000.tokens.npy"
    tokens = np.load(path)
    tokens[1, 4, 7] = 16
    np.save(path, tokens)

    def fit(index):
        index["splits"]["train"]["shards"][0]["tokens_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    edit_index(cache, fit)
    words = "train-00000.tokens.npy has tokens out of range, expected 0 to 15"
    with pytest.raises(UserError, match=words):
        TokenCache.open(cache)
    split = TokenCache.open(cache, verify=False).split("train")
    split.tokens([1, 2], [3, 4])
    with pytest.raises(UserError, match=words):
        split.tokens([2, 1], [4, 4])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda i: i.update(version=2), "of version 2, expected 1"),
        (lambda i: i.update(crops=0), "crops is '0', expected a whole number"),
        (lambda i: i.update(flips=1), "flips is '1', expected true or false"),
        (lambda i: i.update(classes=[]), "classes is"),
        (lambda i: i.update(vocab_size=-5), "vocab_size is -5, expected a whole number"),
        (lambda i: i.update(patch_nums=[3, 2]), "v_patch_nums is"),
        (lambda i: i.pop("tokenizer_hash"), "tokenizer_hash is 'None', expected a SHA-256"),
        (lambda i: i.pop("splits"), "splits is"),
        (lambda i: i["splits"].pop("train"), "splits is"),
        (lambda i: i["splits"].update(other=i["splits"]["val"]), "splits is"),
        (lambda i: i["splits"]["train"]["shards"][0].update(images="4"), "splits is"),
        (lambda i: i["splits"]["train"]["shards"][0].update(images=5), "train-00000.tokens.npy holds"),
        (lambda i: i["splits"]["train"]["shards"].append(i["splits"]["val"]["shards"][0]), "cannot read .*train-00004"),
        (lambda i: i.update(vocab_size=1 << 17), "train-00000.tokens.npy holds uint16"),
    ],
)
def test_bad_indices(cache, change, words):
    edit_index(cache, change)
    with pytest.raises(UserError, match=words):
        TokenCache.open(cache)


def test_another_tokenizer(cache):
    opened = TokenCache.open(cache)
    opened.check_tokenizer(tiny_vae())
    with pytest.raises(UserError, match="was made by another tokenizer"):
        opened.check_tokenizer(tiny_vae(1))
    save_checkpoint(cache / "tokenizer", tiny_vae(1))
    with pytest.raises(UserError, match="tokenizer is another tokenizer"):
        TokenCache.open(cache)
    edit_index(cache, lambda index: index.update(size=16))
    with pytest.raises(UserError, match="expected those of index.json"):
        TokenCache.open(cache, verify=False).tokenizer()
    shutil.rmtree(cache / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        TokenCache.open(cache)


# -------------------------------------------------------------------------------------------------------------- batches
def take(split, count, **options):
    return list(islice(CacheBatches(split, batch=6, seed=7, **options), count))


def assert_same(found, expected):
    for one, other in zip(zip(*found), zip(*expected)):
        assert torch.equal(torch.cat(one), torch.cat(other))


def test_batches_follow_the_order_of_the_seed(whole):
    split = TokenCache.open(whole).split("train")
    batches = take(split, 40)
    views = set()
    for step, (tokens_BL, labels_B) in enumerate(batches):
        images = examples_at(batch_positions(step, 6), 14, 7)
        assert tokens_BL.shape == (6, 21) and tokens_BL.dtype == labels_B.dtype == torch.int64
        assert torch.equal(labels_B, split.labels[images])
        for tokens_L, image in zip(tokens_BL, images):
            fitting = [v for v in range(6) if torch.equal(split.tokens([image], [v])[0], tokens_L)]
            assert fitting
            views.update(fitting if len(fitting) == 1 else ())
    assert views == set(range(6))
    assert_same(take(split, 3, first_step=4), batches[4:7])
    assert_same(take(split, 20, parts=2), batches[:10])
    assert_same(take(split, 4, parts=2, first_step=3), batches[3:5])
    shares = [take(split, 10, ranks=Ranks(rank, 3), parts=2) for rank in range(3)]
    assert_same([share[step] for step in range(10) for share in shares], batches[:5])
    with pytest.raises(UserError, match=r"batch: got 6, expected a multiple of 1 \(ranks\) times 4"):
        CacheBatches(split, batch=6, seed=0, parts=4)
