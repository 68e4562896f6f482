from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest
import torch

from var_fast.errors import UserError
from var_fast.training.loop import Cadence, run_loop
from var_fast.training.ranks import Ranks
from var_fast.training.run_checkpoints import RunCheckpoints, read_facts
from var_fast.training.schedule import Limits

RARE = Cadence(save_every_steps=0, eval_every_steps=0, sample_every_steps=0, log_every_steps=2)


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
        self.ranks, self.skipped = Ranks(), set()
        self.total = torch.zeros(())
        self.started = 0

    def start(self):
        self.started += 1

    def batches(self, first_step):
        return count(first_step)

    def step(self, step, progress, batch):
        assert step == batch
        loss = torch.rand(())
        if step == self.at:
            loss = self.do() or loss
        self.total += loss
        return {"loss": loss, "both": torch.stack([loss, 2 * loss]), "grad_norm": loss}

    def evaluate(self):
        return {"total": float(self.total)}

    def badness(self, metrics):
        return -metrics["total"]

    def tensors(self):
        return {"total": self.total}

    def facts(self):
        return {"started": self.started}

    def set_facts(self, facts):
        self.started = facts["started"]

    def draw_samples(self, path, step):
        path.write_bytes(b"")

    def model_writer(self):
        return lambda folder: (folder / "model.txt").write_text(f"{float(self.total)}")

    def batch_for_study(self, batch):
        return {"batch": torch.tensor(batch)}


def run(job, out, steps, **options):
    options.setdefault("cadence", RARE)
    return run_loop(job, out, Limits(steps=steps), tensorboard=False, **options)


def lines(out, *names):
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [[line.get(name) for name in names] for line in logged]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path, number):
    before = signal.getsignal(signal.SIGINT)  # a shell lets what it starts in the background ignore it
    whole = run(CountJob(), tmp_path / "whole", 9)
    stopped = run(CountJob(at=3, do=lambda: os.kill(os.getpid(), number)), tmp_path / "cut", 9)
    assert not stopped.finished and stopped.step == 4
    assert RunCheckpoints(tmp_path / "cut" / "checkpoints").latest().name == "step-00000004"
    resumed = CountJob()
    rest = run(resumed, tmp_path / "cut", 9)
    assert rest.finished and rest.step == 9 and resumed.started == 1
    assert rest.metrics["total"] == whole.metrics["total"] != 0
    assert lines(tmp_path / "cut", "kind", "step", "loss", "both") == lines(
        tmp_path / "whole", "kind", "step", "loss", "both"
    )
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_changes_nothing(tmp_path):
    """A cluster signals every process, and torchrun passes its own signal on."""
    job = CountJob(at=3, do=lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(3)] and None)
    assert run(job, tmp_path, 9).step == 4
    assert RunCheckpoints(tmp_path / "checkpoints").latest().name == "step-00000004"


def test_a_save_that_fails_is_said_and_the_next_one_is_tried(tmp_path, capsys, monkeypatch):
    real, calls = RunCheckpoints._write, []

    def fail_first(self, staged, writer):
        calls.append(writer)
        if len(calls) == 1:
            self._failure = UserError("cannot write step 2: No space left on device")
        else:
            real(self, staged, writer)

    monkeypatch.setattr(RunCheckpoints, "_write", fail_first)
    assert run(CountJob(), tmp_path, 6, cadence=Cadence(save_every_steps=2)).finished
    assert "warning: cannot write step 2" in capsys.readouterr().out
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("name", ["disc_loss", "disc_grad_norm"])
def test_a_lost_discriminator_stops_the_run_too(tmp_path, name):
    class Adversarial(CountJob):
        def step(self, step, progress, batch):
            return {**super().step(step, progress, batch), name: torch.tensor(1.0 if step != 3 else float("nan"))}

    with pytest.raises(UserError, match=f"{name} became nan at step 3"):
        run(Adversarial(), tmp_path, 9)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_batch_and_checkpoint(tmp_path):
    job = CountJob(at=5, do=lambda: torch.tensor(float("nan")))
    with pytest.raises(UserError, match="loss became nan at step 5; its batch is in .*step-00000004 is from before"):
        run(job, tmp_path, 9, cadence=Cadence(save_every_steps=2))
    study = torch.load(tmp_path / "bad-batch-step-5-rank-0.pt", weights_only=True)
    assert study["step"] == 5 and study["batch"] == 5


def test_weights_of_a_lost_step_are_not_saved(tmp_path):
    """The step before the checkpoint of step 4 is the lost one: it has to be found before, not one step late."""
    job = CountJob(at=3, do=lambda: torch.tensor(float("inf")))
    with pytest.raises(UserError, match="loss became inf at step 3; .*step-00000002 is from before"):
        run(job, tmp_path, 9, cadence=Cadence(save_every_steps=2))


def test_a_loss_that_grows_without_end_stops_the_run(tmp_path):
    class Growing(CountJob):
        def step(self, step, progress, batch):
            value = torch.tensor(1.0 if step < 60 else 1.3 ** (step - 60))
            return {"loss": value, "grad_norm": value}

    with pytest.raises(UserError, match="the loss has diverged: its running mean is .*; no checkpoint was saved yet"):
        run(Growing(), tmp_path, 500)
    with pytest.raises(UserError, match="the loss has diverged"):  # also where the watch was resumed
        run(Growing(), tmp_path / "again", 65)
        run(Growing(), tmp_path / "again", 500)


def test_other_settings_are_refused_unless_restarted(tmp_path):
    run(CountJob(), tmp_path, 2)
    other = CountSettings(width=(1, 3))
    with pytest.raises(UserError, match=r"width: got \(1, 3\).*\[1, 2\].*--restart"):
        run(CountJob(other), tmp_path, 4)
    assert run(CountJob(other), tmp_path, 1, resume="never").step == 1


def test_settings_that_are_not_compared(tmp_path):
    @dataclass(frozen=True)
    class Named(CountSettings):
        place: str = field(default="", compare=False)

    run(CountJob(Named(place="a")), tmp_path, 1)
    assert run(CountJob(Named(place="b")), tmp_path, 2).step == 2


def test_another_runs_checkpoint_can_be_gone_on_from(tmp_path):
    whole = run(CountJob(), tmp_path / "whole", 6)
    run(CountJob(), tmp_path / "first", 4)
    assert run(CountJob(), tmp_path / "second", 5, resume=tmp_path / "first").step == 5
    # the same command goes on from where the new run is, not from the old one again
    again = run(CountJob(), tmp_path / "second", 6, resume=tmp_path / "first")
    assert again.metrics == whole.metrics and lines(tmp_path / "second", "step")[0] == [5]


def test_an_older_checkpoint_of_the_same_run_is_refused(tmp_path, monkeypatch):
    run(CountJob(), tmp_path / "run", 4, cadence=Cadence(save_every_steps=2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="resume: .*step-00000002 is older than .*step-00000004 .*expected another --out"
    ):
        run(CountJob(), tmp_path / "run", 6, resume=Path("run/checkpoints/step-00000002"))


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    class Other(CountJob):
        kind = "other"

    run(CountJob(), tmp_path, 1)
    with pytest.raises(UserError, match="resume: .* is of a count, expected one of a other"):
        run(Other(), tmp_path, 2)


def test_a_longer_limit_goes_on_from_the_end_and_the_clock_adds_up(tmp_path):
    run(CountJob(), tmp_path, 3)
    before_s = read_facts(tmp_path / "checkpoints" / "step-00000003")["elapsed_s"]
    second = run(CountJob(), tmp_path, 5)
    assert second.step == 5 and second.elapsed_s > before_s > 0
    assert second.metrics == run(CountJob(), tmp_path / "whole", 5).metrics


def test_a_time_limit_ends_the_run(tmp_path):
    outcome = run_loop(CountJob(), tmp_path, Limits(minutes=0.3 / 60), cadence=RARE, tensorboard=False)
    assert outcome.finished and 0.3 <= outcome.elapsed_s < 5 and outcome.step > 1


def test_what_a_run_leaves(tmp_path):
    run(CountJob(), tmp_path, 4, cadence=Cadence(log_every_steps=2, eval_every_steps=2, sample_every_steps=3, keep=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best", "checkpoints", "log.jsonl", "model", "samples", "settings.json",
    ]  # fmt: skip
    assert lines(tmp_path, "kind", "step") == [["train", 2], ["eval", 2], ["train", 4], ["eval", 4]]
    assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == ["step-00000003.png", "step-00000004.png"]
    assert json.loads((tmp_path / "settings.json").read_text()) == {"kind": "count", "seed": 0, "width": [1, 2]}
    ((_, loss, both),) = lines(tmp_path, "step", "loss", "both")[:1]
    assert 0 < loss < 1 and both == pytest.approx([loss, 2 * loss])


def test_best_is_the_best_and_is_kept(tmp_path):
    class Turning(CountJob):
        def evaluate(self):
            return {"total": -abs(float(self.batch) - 3)}

        def step(self, step, progress, batch):
            self.batch = batch
            return super().step(step, progress, batch)

    cadence = Cadence(save_every_steps=1, eval_every_steps=1, keep=1)
    run(Turning(), tmp_path, 7, cadence=cadence)
    assert {p.name for p in (tmp_path / "checkpoints").glob("step-*")} == {"step-00000004", "step-00000007"}
    assert (tmp_path / "best" / "model.txt").read_text() != (tmp_path / "model" / "model.txt").read_text()


def test_unreadable_pictures_are_counted_and_named_once(tmp_path, capsys):
    job = CountJob()
    job.skipped = {"b.png", "a.png"}
    run(job, tmp_path, 6)
    assert (tmp_path / "skipped.txt").read_text() == "a.png\nb.png\n"
    assert capsys.readouterr().out.count("2 pictures cannot be read") == 1


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="out: cannot write"):
        run(CountJob(), tmp_path / "file" / "run", 1)


def test_restart_forgets_the_old_run_at_once(tmp_path):
    run(CountJob(), tmp_path, 3)

    with pytest.raises(KeyboardInterrupt):
        run(CountJob(at=0, do=interrupt), tmp_path, 3, resume="never")
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    assert not (tmp_path / "best").exists() and not (tmp_path / "model").exists()


def test_restart_in_a_folder_that_is_no_run_removes_nothing(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("")
    (tmp_path / "samples").mkdir()
    run(CountJob(at=0, do=lambda: os.kill(os.getpid(), signal.SIGTERM)), tmp_path / "other", 3, resume="never")
    with pytest.raises(KeyboardInterrupt):
        run(CountJob(at=0, do=interrupt), tmp_path, 3, resume="never")
    assert (tmp_path / "model" / "mine").exists() and (tmp_path / "samples").exists()


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["settings", "job", "step", "metrics"])
def test_checkpoint_with_other_entries_is_a_user_error(tmp_path, name):
    run(CountJob(), tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-00000001" / "facts.json"
    facts = json.loads(path.read_text())
    del facts[name]
    path.write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"step-00000001 holds other entries .*" + name):
        run(CountJob(), tmp_path, 2)


@pytest.mark.parametrize("name", ["save_every_s", "save_every_steps", "eval_every_steps", "log_every_steps", "keep"])
def test_bad_cadence(name):
    with pytest.raises(UserError, match=name):
        Cadence(**{name: -1})
