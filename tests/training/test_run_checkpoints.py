"""Checkpoints of runs: bitwise round trips, saves in the background, kills, full disks, damage, and two ranks."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.toy_run import Run, full_disk, same
from var_fast.errors import UserError
from var_fast.training.adam_state import adam_tensors
from var_fast.training.ranks import Ranks
from var_fast.training.run_checkpoints import RunCheckpoints, resolve

STEP = "step-00000001"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, step: int = 1, value: float = 1.0, **kind) -> Path:
    """A checkpoint of one entry, w: (3, 4), full of `value`."""
    RunCheckpoints(folder, keep=0).save(step, {"w": torch.full((3, 4), value)}, {"step": step}, wait=True, **kind)
    return folder / f"step-{step:08d}"


def script(name: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs a script beside this file to its good end."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name(name)), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=4), dtype=st.sampled_from(DTYPES), data=st.data())
def test_round_trip_is_bitwise(tmp_path_factory, shape, dtype, data):
    order = data.draw(st.permutations(range(len(shape))))  # how the dimensions lie in memory
    folder = tmp_path_factory.mktemp("checkpoints")
    size = 1
    for length in shape:
        size *= length

    def laid_out(values: torch.Tensor) -> torch.Tensor:
        back = sorted(range(len(shape)), key=lambda dimension: order[dimension])
        return values.reshape(shape).permute(order).contiguous().permute(back)

    values = torch.randint(0, 2 if dtype == torch.bool else 120, (size,)).to(dtype)
    saved, target = laid_out(values), laid_out(torch.zeros(size, dtype=dtype))
    strides = target.stride()
    checkpoints = RunCheckpoints(folder)
    checkpoints.save(1, {"deep": {"er": saved}, "other": torch.tensor(7)}, {}, wait=True)
    other = torch.tensor(0)
    checkpoints.load(checkpoints.latest(), {"deep": {"er": target}, "other": other})
    assert torch.equal(target, saved) and target.stride() == strides and other == 7


def test_nan_and_facts_round_trip(tmp_path):
    bits = torch.tensor([0x7FC00001, 0x00000001, -0x80000000], dtype=torch.int32).view(torch.float32)  # NaN, tiny, -0
    facts = {"losses": [0.1, 1e-300], "name": "é", "nested": {"none": None}}
    checkpoints = RunCheckpoints(tmp_path / "deep" / "er")
    checkpoints.save(12, {"w": bits}, facts, wait=True)
    target = torch.zeros(3)
    assert checkpoints.load(tmp_path / "deep" / "er" / "step-00000012", {"w": target}) == facts
    assert torch.equal(target.view(torch.int32), bits.view(torch.int32))
    assert checkpoints.facts(checkpoints.latest()) == facts


def test_training_goes_on_in_the_tensors_while_they_are_written(tmp_path, monkeypatch):
    may_write = threading.Event()
    write_data = dcp.FileSystemWriter.write_data

    def late(self, plan, planner):
        assert may_write.wait(20)
        return write_data(self, plan, planner)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", late)
    w, scalar, parameter = torch.ones(3, 4), torch.tensor(1.0), torch.nn.Parameter(torch.ones(2))
    facts = {"losses": [1]}
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, {"w": w, "s": scalar, "p": parameter}, facts)
    for tensor in (w, scalar, parameter.data):  # before a byte of them is written
        tensor.zero_()
    facts["losses"].append(2)
    assert checkpoints.latest() is None
    may_write.set()
    checkpoints.wait()
    assert checkpoints.load(tmp_path / STEP, {"w": w, "s": scalar, "p": parameter}) == {"losses": [1]}
    assert (w == 1).all() and scalar == 1 and (parameter == 1).all()


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None and checkpoints.best() is None
    for step, best in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        checkpoints.save(step, {"w": torch.ones(2)}, {}, best=best)
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert checkpoints.best() == tmp_path / "step-00000002"
    assert checkpoints.latest() == tmp_path / "step-00000005"
    checkpoints.save(6, {"w": torch.ones(2)}, {}, best=True, wait=True)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_keep_0_keeps_all_and_steps_beyond_eight_digits(tmp_path):
    for step in (0, 1, 2, 123456789):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000000", STEP, "step-00000002", "step-123456789"]
    assert RunCheckpoints(tmp_path).latest().name == "step-123456789"
    with pytest.raises(UserError, match="keep: -1, expected 0"):
        RunCheckpoints(tmp_path, keep=-1)


def test_a_step_saved_again_is_replaced_and_stays_the_best(tmp_path):
    save(tmp_path, value=1.0, best=True)
    save(tmp_path, value=2.0)
    w = torch.zeros(3, 4)
    RunCheckpoints(tmp_path).load(tmp_path / STEP, {"w": w})
    assert (w == 2).all() and names(tmp_path) == [STEP] and RunCheckpoints(tmp_path).best() == tmp_path / STEP


def test_a_run_taken_up_earlier_does_not_lose_what_it_saves(tmp_path):
    for step in (1, 5, 6):
        save(tmp_path, step)
    RunCheckpoints(tmp_path, keep=2).save(2, {"w": torch.ones(2)}, {}, wait=True)
    assert names(tmp_path) == [STEP, "step-00000002", "step-00000005", "step-00000006"]


def test_resolve(tmp_path):
    first, last = save(tmp_path / "checkpoints", 1), save(tmp_path / "checkpoints", 2)
    for path, expected in ((tmp_path, last), (tmp_path / "checkpoints", last), (first, first)):
        assert resolve(path) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no complete checkpoint"):
        resolve(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere does not exist"):
        resolve(tmp_path / "nowhere")


def test_only_what_is_asked_for(tmp_path):
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, {"ema": {"w": torch.ones(2)}, "adam": {"w": torch.zeros(2)}}, {}, wait=True)
    w = torch.zeros(2)
    with pytest.raises(UserError, match="holds adam/w, which this run has not"):
        checkpoints.load(tmp_path / STEP, {"ema": {"w": w}})
    checkpoints.load(tmp_path / STEP, {"ema": {"w": w}}, strict=False)
    assert (w == 1).all()


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"w": torch.zeros(3, 4), "b": torch.zeros(1)}, "lacks b$"),
        ({"w": torch.zeros(3, 4), "b": {"c": torch.zeros(1), "d": torch.zeros(1)}}, "lacks b/c and 1 more"),
        ({"w": torch.zeros(4, 3)}, r"w is float32 \(3, 4\), expected float32 \(4, 3\)"),
        ({"w": torch.zeros(3, 4).double()}, r"w is float32 \(3, 4\), expected float64 \(3, 4\)"),
        ({}, "holds w, which this run has not"),
    ],
)
def test_other_entries_are_named(tmp_path, tensors, words):
    with pytest.raises(UserError, match=words):
        RunCheckpoints(tmp_path).load(save(tmp_path), tensors)


def test_only_tensors_are_saved(tmp_path):
    with pytest.raises(TypeError, match="a/b is a float"):
        RunCheckpoints(tmp_path).save(1, {"a": {"b": 1.0}}, {})
    with pytest.raises(TypeError):
        RunCheckpoints(tmp_path).save(1, {}, {"a": object()})


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_foreign_runs(tmp_path):
    path, exploded, w = save(tmp_path / "run"), tmp_path / "exploded", torch.zeros(3, 4)
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(exploded)))
    RunCheckpoints(tmp_path).load(path, {"w": w})  # it is not even looked at
    assert (w == 1).all()
    torch.save(Bomb(exploded), path / "__0_0.distcp")
    index = json.loads((path / "tensors.json").read_text())
    index["w"]["chunks"][0]["bytes"] = (path / "__0_0.distcp").stat().st_size
    (path / "tensors.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"cannot read {path}: Weights only load failed"):
        RunCheckpoints(tmp_path).load(path, {"w": w})
    assert not exploded.exists()


def _chunk(**change):
    return lambda index: index["w"]["chunks"][0].update(change)


@pytest.mark.parametrize(
    "change, words",
    [
        (_chunk(file="../other/__0_0.distcp"), "is no name of a checkpoint's file"),
        (_chunk(file="/etc/passwd"), "is no name of a checkpoint's file"),
        (_chunk(file="__7_0.distcp"), "__7_0.distcp does not exist"),
        (_chunk(bytes=10**9), "__0_0.distcp is cut off"),
        (_chunk(start=-1), "are no lengths"),
        (_chunk(start=10), "cannot read"),
        (_chunk(sizes=[3, 3]), "do not cover the tensor exactly once"),
        (_chunk(sizes=[12]), "a chunk of other dimensions"),
        (_chunk(offsets=[1, 0]), "reaches beyond the tensor's shape"),
        (lambda index: index["w"]["chunks"].append(index["w"]["chunks"][0]), "do not cover the tensor exactly once"),
        (lambda index: index["w"].update(dtype="load"), "no dtype 'load'"),
        (lambda index: index["w"].update(dtype="int64"), r"w is int64 \(3, 4\), expected float32"),
        (lambda index: index["w"].update(shape=[10**30]), "are no lengths"),
        (lambda index: index["w"].pop("chunks"), "cannot read"),
        (lambda index: index.update(w=3), "cannot read"),
    ],
)
def test_a_forged_index_is_refused(tmp_path, change, words):
    path = save(tmp_path)
    index = json.loads((path / "tensors.json").read_text())
    change(index)
    (path / "tensors.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        RunCheckpoints(tmp_path).load(path, {"w": torch.zeros(3, 4)})


@pytest.mark.parametrize("file", ["__0_0.distcp", "tensors.json", "facts.json"])
@pytest.mark.parametrize("left", [0, 0.5, 0.99, None])
def test_cut_off_and_missing_files(tmp_path, file, left):
    path = save(tmp_path)
    if left is None:
        (path / file).unlink()
    else:
        whole = (path / file).read_bytes()
        (path / file).write_bytes(whole[: int(left * len(whole.rstrip()))])
    with pytest.raises(UserError, match="checkpoint: .*" + ("does not exist" if left is None else "cannot read")):
        RunCheckpoints(tmp_path).load(path, {"w": torch.zeros(3, 4)})


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100000, "\xff"])
def test_facts_that_are_none(tmp_path, text):
    path = save(tmp_path)
    (path / "facts.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="facts.json"):
        RunCheckpoints(tmp_path).facts(path)


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path):
    save(tmp_path)
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    before = sorted(path.read_bytes() for path in (tmp_path / STEP).iterdir())
    for room, facts in ((500, {}), (100000, {"long": "x" * 200000})):  # the values' file, the last file
        with full_disk(room):
            checkpoints.save(2, {"w": torch.ones(40, 40)}, facts)
            with pytest.raises(UserError, match="cannot write .*: File too large; what was saved before is intact"):
                checkpoints.save(3, {"w": torch.ones(40, 40)}, {})
        checkpoints.wait()  # said once
        assert names(tmp_path) == [STEP]
        assert sorted(path.read_bytes() for path in (tmp_path / STEP).iterdir()) == before
    checkpoints.save(2, {"w": torch.ones(40, 40)}, {}, wait=True)
    assert names(tmp_path) == ["step-00000002"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/run/step-00000001: Not a directory"):
        save(tmp_path / "file" / "run")


def test_the_plain_reader_of_torch_reads_it(tmp_path):
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, {"a": {"w": torch.arange(6.0)}}, {}, wait=True)
    tensors = {"a/w": torch.zeros(6)}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(tmp_path / STEP), no_dist=True)
    assert torch.equal(tensors["a/w"], torch.arange(6.0))


@pytest.mark.parametrize("fused", [False, True])
def test_eight_steps_are_four_and_four(tmp_path, fused):
    whole, first = Run("plain", fused, Ranks()), Run("plain", fused, Ranks())
    for _ in range(8):
        whole.step()
    checkpoints = RunCheckpoints(tmp_path)
    for _ in range(4):
        first.step()
    first.save(checkpoints)
    first.step()
    checkpoints.wait()
    again = Run("plain", fused, Ranks(), seed=9)
    again.load(checkpoints, checkpoints.latest())
    assert again.model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for _ in range(4):
        again.step()
    assert again.losses == whole.losses and same(again.whole(), whole.whole())


@pytest.mark.parametrize("fused", [False, True])
def test_adam_state_is_made_as_torch_makes_it(fused):
    made, stepped = Run("plain", fused, Ranks()), Run("plain", fused, Ranks())
    stepped.step()
    ours, theirs = adam_tensors(made.model, made.optimizer), adam_tensors(stepped.model, stepped.optimizer)
    assert ours.keys() == theirs.keys() == dict(made.model.named_parameters()).keys()
    for name, state in theirs.items():
        for key, tensor in state.items():
            mine = ours[name][key]
            assert (mine == 0).all() and (tensor != 0).any(), (name, key)
            assert (mine.shape, mine.dtype, mine.stride()) == (tensor.shape, tensor.dtype, tensor.stride()), (name, key)
    assert theirs["conv.weight"]["exp_avg"] is stepped.optimizer.state[stepped.model.conv.weight]["exp_avg"]


def test_two_ranks(tmp_path):
    plain, checkpoints = Run("plain", True, Ranks()), RunCheckpoints(tmp_path / "plain")
    for _ in range(3):
        plain.step()
    plain.save(checkpoints, wait=True)
    torch.save(plain.whole(), tmp_path / "plain.pt")
    done = script("checkpoints_on_two_ranks.py", tmp_path)
    assert "Warning" not in done.stderr and "checkpoint" not in done.stderr
    # two shards -> one whole copy; the script loads the reverse
    again = Run("plain", True, Ranks(), seed=9)
    again.load(checkpoints, tmp_path / "fsdp" / "step-00000008")
    assert same(again.whole(), torch.load(tmp_path / "fsdp.pt", weights_only=True))
    assert len(again.losses) == 8


def test_killed_at_any_moment(tmp_path):
    script("killed_runs.py", tmp_path)
