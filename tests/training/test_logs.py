from __future__ import annotations

import json
import os
import sys

import pytest

from var_fast.errors import UserError
from var_fast.training.logs import RunLog


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, 0, tensorboard=False)
    for step in (2, 4, 6):
        log.write("train", step, {"loss": step / 2})
    log.close()
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "step": 4, "lo')  # a kill while writing
    log = RunLog(tmp_path, 4, tensorboard=False)
    log.write("train", 6, {"loss": 9.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 1.0), (4, 2.0), (6, 9.0)]


def test_tensorboard_has_every_number_by_name(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, 0)
    log.write("eval", 3, {"loss": 2.0, "per_scale": [1.5, 2.5], "note": "words"})
    log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(found.Tags()["scalars"]) == ["eval/loss", "eval/per_scale/0", "eval/per_scale/1"]
    assert found.Scalars("eval/per_scale/1")[0].value == 2.5


def test_without_weights_and_biases_the_option_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb: Weights & Biases is not installed"):
        RunLog(tmp_path, 0, wandb="project")


def test_a_full_disk_is_a_user_error(tmp_path):
    log = RunLog(tmp_path, 0, tensorboard=False)
    log.close()
    os.remove(tmp_path / "log.jsonl")
    os.symlink("/dev/full", tmp_path / "log.jsonl")
    log._file = open(tmp_path / "log.jsonl", "wb", buffering=0)
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: No space left on device"):
        log.write("train", 1, {"loss": 1.0})


def test_a_full_disk_ends_tensorboards_files_and_not_the_run(tmp_path, capsys):
    log = RunLog(tmp_path, 0, tensorboard=False)

    class Full:
        def add_scalar(self, *arguments):
            raise OSError(28, "No space left on device")

    log._board = Full()
    log.write("train", 1, {"loss": 1.0})
    log.write("train", 2, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert capsys.readouterr().err.count("no more TensorBoard files") == 1
