from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field

import pytest
import torch

from var_fast.errors import UserError
from var_fast.training.files import load_state, save_state
from var_fast.training.loop import Cadence, batch_indices, run_loop, step_seed
from var_fast.training.schedule import Limits


@dataclass(frozen=True)
class CountSettings:
    seed: int = 0
    width: tuple[int, ...] = (1, 2)


class CountJob:
    """Adds up random numbers; can misbehave at a step."""

    kind = "count"
    images_per_step = 1

    def __init__(self, settings=CountSettings(), at=None, do=None):
        self.settings, self.at, self.do = settings, at, do
        self.total = torch.zeros(())

    def step(self, step, progress):
        loss = torch.rand(())
        if step == self.at:
            loss = self.do() or loss
        self.total += loss
        return {"loss": loss}

    def evaluate(self):
        return {"total": float(self.total)}

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


def test_every_epoch_takes_each_example_once_in_another_order():
    seen = torch.cat([batch_indices(10, 4, step, seed=1) for step in range(5)])
    first, second = seen[:10], seen[10:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    assert batch_indices(3, 7, 0, seed=1).bincount().tolist() in ([2, 2, 3], [2, 3, 2], [3, 2, 2])


def test_step_seeds_differ():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(-2, 100)}
    assert len(seeds) == 20 * 102 and all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path, number):
    whole = run_loop(CountJob(), tmp_path / "whole", Limits(steps=9))
    stopped = run_loop(CountJob(at=3, do=lambda: os.kill(os.getpid(), number)), tmp_path / "cut", Limits(steps=9))
    assert not stopped.finished and stopped.step == 4
    assert load_state(tmp_path / "cut" / "checkpoint.pt", "count")["step"] == 4
    rest = run_loop(CountJob(), tmp_path / "cut", Limits(steps=9))
    assert rest.finished and rest.step == 9
    assert rest.metrics["total"] == whole.metrics["total"] != 0
    assert signal.getsignal(number) is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    cadence = Cadence(save_every_steps=4)
    job = CountJob(at=5, do=lambda: torch.tensor(float("nan")))
    with pytest.raises(UserError, match="nan before step 8"):
        run_loop(job, tmp_path, Limits(steps=9), cadence=cadence)
    assert load_state(tmp_path / "checkpoint.pt", "count")["step"] == 4


def test_other_settings_are_refused_unless_restarted(tmp_path):
    run_loop(CountJob(), tmp_path, Limits(steps=2))
    other = CountSettings(width=(1, 3))
    with pytest.raises(UserError, match=r"width: got \(1, 3\).*\(1, 2\)"):
        run_loop(CountJob(other), tmp_path, Limits(steps=4))
    assert run_loop(CountJob(other), tmp_path, Limits(steps=1), restart=True).step == 1


def test_a_longer_limit_goes_on_from_the_end_and_the_clock_adds_up(tmp_path):
    first = run_loop(CountJob(), tmp_path, Limits(steps=3))
    second = run_loop(CountJob(), tmp_path, Limits(steps=5))
    assert second.step == 5 and second.elapsed_s > first.elapsed_s
    expected = run_loop(CountJob(), tmp_path / "whole", Limits(steps=5))
    assert second.metrics == expected.metrics


def test_a_time_limit_ends_the_run(tmp_path):
    outcome = run_loop(CountJob(), tmp_path, Limits(minutes=0.3 / 60), cadence=Cadence(save_every_steps=0))
    assert outcome.finished and 0.3 <= outcome.elapsed_s < 5 and outcome.step > 1


def test_log_is_json_lines(tmp_path):
    run_loop(CountJob(), tmp_path, Limits(steps=4), cadence=Cadence(log_every_steps=2))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 2), ("train", 4), ("eval", 4)]
    assert 0 < lines[0]["loss"] < 1


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot write"):
        run_loop(CountJob(), tmp_path / "file" / "run", Limits(steps=1))


def test_log_on_a_full_disk_is_a_user_error(tmp_path):
    os.symlink("/dev/full", tmp_path / "log.jsonl")
    with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: No space left on device; .*checkpoint\.pt"):
        run_loop(CountJob(), tmp_path, Limits(steps=1))


@pytest.mark.parametrize("missing", ["settings", "job", "step", "metrics"])
def test_checkpoint_with_other_entries_is_a_user_error(tmp_path, missing):
    run_loop(CountJob(), tmp_path, Limits(steps=1))
    state = load_state(tmp_path / "checkpoint.pt", "count")
    del state[missing]
    save_state(tmp_path / "checkpoint.pt", state)
    with pytest.raises(UserError, match=r"checkpoint\.pt holds other entries .*" + missing):
        run_loop(CountJob(), tmp_path, Limits(steps=2))


def test_settings_that_are_not_compared(tmp_path):
    @dataclass(frozen=True)
    class Named(CountSettings):
        place: str = field(default="", compare=False)

    run_loop(CountJob(Named(place="a")), tmp_path, Limits(steps=1))
    assert run_loop(CountJob(Named(place="b")), tmp_path, Limits(steps=2)).step == 2


@pytest.mark.parametrize("name", ["save_every_s", "save_every_steps", "eval_every_s", "log_every_steps"])
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_bad_cadence(name, value):
    with pytest.raises(UserError, match=name):
        Cadence(**{name: value})


def test_restart_forgets_the_old_run_at_once(tmp_path):
    run_loop(CountJob(), tmp_path, Limits(steps=3), cadence=Cadence())
    (tmp_path / "best.pt").write_bytes(b"old")

    def die():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_loop(CountJob(at=0, do=die), tmp_path, Limits(steps=3), cadence=Cadence(), restart=True)
    assert not (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "best.pt").exists()
