"""Batches are a function of (data, seed, step): of nothing else, whoever reads them and from wherever on."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from var_fast.errors import UserError
from var_fast.training.data import Augmentation, TrainBatches, evaluation_batches, open_images
from var_fast.training.order import batch_positions, examples_at
from var_fast.training.ranks import Ranks

AUGMENTATION = Augmentation(8, flip=True)
SEED = 7


def take(source, count, **options):
    batches = TrainBatches(source, AUGMENTATION, batch=6, seed=SEED, **options)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def joined(batches):
    return torch.cat([b.images_u8 for b in batches]), torch.cat([b.labels for b in batches])


def assert_same(found, expected):
    for one, other in zip(joined(found), joined(expected)):
        assert torch.equal(one, other)


@pytest.fixture(params=["image_folder", "shard_folder"])
def source(request):
    return open_images(request.getfixturevalue(request.param), "train")


def test_batches_have_the_examples_of_the_order(source):
    for step, batch in enumerate(take(source, 7)):  # more than two epochs
        assert batch.images_u8.shape == (6, 3, 8, 8) and batch.images_u8.dtype == torch.uint8
        assert batch.skipped == []
        expected = examples_at(batch_positions(step, 6), len(source), SEED)
        assert batch.labels.tolist() == source.labels[expected].tolist()


def test_workers_change_nothing(source):
    assert_same(take(source, 5, workers=2), take(source, 5))


def test_resumed_batches_are_those_of_the_run(source):
    assert_same(take(source, 3, first_step=4), take(source, 7)[4:])
    assert_same(take(source, 4, first_step=4, parts=2), take(source, 12, parts=2)[8:])


def test_shares_of_ranks_and_parts_make_up_the_batch(source):
    whole = take(source, 4)
    shares = [take(source, 4, ranks=Ranks(rank, 2)) for rank in range(2)]
    assert_same([share[step] for step in range(4) for share in shares], whole)
    assert_same(take(source, 12, parts=3), whole)
    both = [take(source, 12, ranks=Ranks(rank, 2), parts=3) for rank in range(2)]
    assert_same([share[step] for step in range(12) for share in both], whole)


def test_seeds_differ(source):
    other = list(islice(TrainBatches(source, AUGMENTATION, batch=6, seed=SEED + 1), 2))
    assert not torch.equal(joined(other)[0], joined(take(source, 2))[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_generator_is_left_alone(source, workers):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    take(source, 2, workers=workers)
    list(evaluation_batches(source, AUGMENTATION, batch=4, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_named_and_replaced_by_the_next(image_folder, workers):
    broken = [image_folder / "train/bird" / name for name in ("03.png", "04.png")] + [image_folder / "train/dog/04.png"]
    intact = open_images(image_folder, "train")
    clean = take(intact, 5)
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    source = open_images(image_folder, "train")
    batches = take(source, 5, workers=workers)
    replaced = {3: 5, 4: 5, 14: 0}  # the last one is followed by the first
    for step, (batch, whole) in enumerate(zip(batches, clean)):
        order = examples_at(batch_positions(step, 6), len(source), SEED)
        named = {3: [3, 4], 4: [4], 14: [14]}
        assert batch.skipped == [source.name(i) for index in order for i in named.get(index, [])]
        assert batch.labels.tolist() == [int(source.labels[replaced.get(i, i)]) for i in order]
        good = torch.tensor([i not in replaced for i in order])
        assert torch.equal(batch.images_u8[good], whole.images_u8[good])
    assert sum(len(b.skipped) for b in batches) >= 6


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_image_is_one_line(image_folder, workers):
    for path in (image_folder / "train").rglob("*.png"):
        path.write_bytes(b"no picture")
    source = open_images(image_folder, "train")
    with pytest.raises(UserError, match=r"^data: none of the 15 images can be read, from .*png on$"):
        take(source, 1, workers=workers)
    with pytest.raises(UserError, match=r"^data: none of 15 images can be read, from .*00.png on$"):
        list(evaluation_batches(source, AUGMENTATION, batch=4, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_each_image_once(source, workers):
    n = len(source)
    batches = list(evaluation_batches(source, AUGMENTATION, batch=4, workers=workers))
    assert [len(b) for b in batches] == [4] * (n // 4) + [n % 4] * (n % 4 > 0)
    images, labels = joined(batches)
    assert torch.equal(labels, source.labels)
    assert all(torch.equal(images[i], AUGMENTATION.centre(source.read(i))) for i in range(n))
    for ranks in (2, 4):
        shares = [list(evaluation_batches(source, AUGMENTATION, batch=4, rank=r, ranks=ranks)) for r in range(ranks)]
        assert_same([batch for share in shares for batch in share], batches)


def test_limited_evaluation_is_spread_over_the_source(image_folder):
    source = open_images(image_folder, "train")
    (batch,) = evaluation_batches(source, AUGMENTATION, batch=8, limit=3)
    assert batch.labels.tolist() == [0, 1, 2]
    assert sum(len(b) for b in evaluation_batches(source, AUGMENTATION, batch=8, limit=99)) == 15
    empty = [list(evaluation_batches(source, AUGMENTATION, batch=8, limit=1, rank=r, ranks=2)) for r in range(2)]
    assert sorted(map(len, empty)) == [0, 1]


@pytest.mark.parametrize("first, last", [(0, 2), (4, 6), (13, 15)])
def test_evaluation_leaves_corrupt_images_out_and_names_all(image_folder, first, last):
    """With two images a batch, also batches that are corrupt as a whole, at the begin, in the middle and at the end."""
    source = open_images(image_folder, "train")
    for i in range(first, last):
        with open(source.name(i), "wb"):
            pass
    batches = list(evaluation_batches(source, AUGMENTATION, batch=2))
    assert all(len(b) == len(b.images_u8) > 0 for b in batches)
    assert [name for b in batches for name in b.skipped] == [source.name(i) for i in range(first, last)]
    kept = [i for i in range(15) if not first <= i < last]
    assert joined(batches)[1].tolist() == source.labels[kept].tolist()


def test_a_rank_with_corrupt_images_only_leaves_evaluation_to_the_others(image_folder):
    source = open_images(image_folder, "val")
    with open(source.name(5), "wb"):
        pass
    shares = [list(evaluation_batches(source, AUGMENTATION, batch=8, rank=r, ranks=6)) for r in range(6)]
    assert [sum(map(len, share)) for share in shares] == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_of_the_disk_is_no_corrupt_image(image_folder, workers):
    """Such a fault may pass: to train on, or to fill a cache, without these images would be to lose them unseen."""
    source = open_images(image_folder, "train")
    os.remove(source.name(3))
    os.mkdir(source.name(3))
    for batches in (
        TrainBatches(source, AUGMENTATION, batch=15, seed=0, workers=workers),
        evaluation_batches(source, AUGMENTATION, batch=15, workers=workers),
    ):
        with pytest.raises(UserError, match=r"data: cannot read .*03\.png: Is a directory"):
            next(batches)


def test_a_picture_that_another_program_would_have_to_draw_is_corrupt(image_folder):
    source = open_images(image_folder, "train")
    with open(source.name(0), "wb") as file:
        file.write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(OSError, match="cannot identify image file"):
        source.read(0)


def test_bad_arguments(source):
    with pytest.raises(UserError, match=r"batch: got 6, expected a multiple of 4 \(ranks\) times 1 \(parts\)"):
        TrainBatches(source, AUGMENTATION, batch=6, seed=0, ranks=Ranks(0, 4))
    with pytest.raises(UserError, match="workers: got -1"):
        TrainBatches(source, AUGMENTATION, batch=6, seed=0, workers=-1)


class Killed:
    """A source whose worker dies, as the kernel kills one when memory is short."""

    classes, labels = ["a"], torch.zeros(4, dtype=torch.int64)

    def __len__(self):
        return 4

    def name(self, i):
        return str(i)

    def read(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_a_user_error():
    with pytest.raises(UserError, match="data: a worker was killed, for want of memory"):
        next(TrainBatches(Killed(), AUGMENTATION, batch=2, seed=0, workers=1))


def test_signals_to_all_processes_do_not_end_the_workers(source):
    """Ctrl-C reaches the workers too, while the trainer still wants to finish its step and save."""
    before = set(multiprocessing.active_children())
    batches = TrainBatches(source, AUGMENTATION, batch=6, seed=SEED, workers=2)
    found = [next(batches), next(batches)]  # one of each worker: both have begun
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.2)
    found += islice(batches, 7)
    assert all(worker.is_alive() for worker in workers)
    assert_same(found, take(source, 9))
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


def run_script(script):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from var_fast.training.data import *\n" + script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_script_with_workers_ends(image_folder):
    script = f"""
source = open_images({str(image_folder)!r}, "train")
batches = TrainBatches(source, Augmentation(8), batch=2, seed=0, workers=2)
some = evaluation_batches(source, Augmentation(8), batch=2, workers=1)
print(len(next(batches)), len(next(some)), flush=True)
"""
    assert run_script(script) == (0, "2 2\n", "")


def test_a_script_that_keeps_an_error_of_a_worker_ends(image_folder):
    """As a debugger does, or a test: the error keeps the frames it came through."""
    script = f"""
import os
source = open_images({str(image_folder)!r}, "train")
os.remove(source.name(3))
os.mkdir(source.name(3))
batches = TrainBatches(source, Augmentation(8), batch=15, seed=0, workers=2)
try:
    next(batches)
except Exception as error:
    kept = error
print(type(kept).__name__, flush=True)
"""
    assert run_script(script) == (0, "UserError\n", "")


def test_sources_can_be_sent_to_another_process(source):
    sent = pickle.loads(pickle.dumps(source))
    assert sent.fingerprint() == source.fingerprint() and np.array_equal(sent.read(3), source.read(3))
