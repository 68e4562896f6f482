"""A run's checkpoints: written in the background, whole or not at all, and loadable on any number of ranks.

    FOLDER/step-00001000/
        __0_0.distcp, __1_0.distcp, ...     each rank's shards (torch.distributed.checkpoint)
        .metadata, tensors.json             what lies where
        facts.json                          the rest of the run's state, whatever JSON can say
        best                                an empty file: the best so far when it was written

A checkpoint grows in `.step-00001000.part` and takes its name when every rank's file is on the disk: a name without a
dot means a complete checkpoint, after a kill at any moment too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError
from var_fast.training import tensor_index
from var_fast.training.files import write_atomic, write_json
from var_fast.training.ranks import Ranks

FACTS, BEST = "facts.json", "best"
_NAME = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.(step-(\d{8,}))\.(part|old)")


class RunCheckpoints:
    """The checkpoints in `folder`; every rank of the run makes one and calls the same methods in the same order.

    keep: how many of the newest stay, besides the best one; 0: all. Nothing on the disk changes before the first save.
    Call wait() at the end: before the ranks part, and to hear of the last save's failure.
    """

    def __init__(self, folder: str | Path, ranks: Ranks | None = None, keep: int = 3):
        if keep < 0:
            raise UserError(f"keep: {keep}, expected 0 (all) or more")
        # said at each save of a run of one process, where it is no news
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        self.folder, self.keep = Path(folder), keep
        self._ranks = ranks or Ranks()
        # the background's own: its collectives must not meet the training's
        self._group = dist.new_group(backend="gloo") if self._ranks.count > 1 else None
        self._thread: threading.Thread | None = None
        self._failure: UserError | None = None

    def save(
        self, step: int, tensors: dict[str, Any], facts: dict[str, Any], *, best: bool = False, wait: bool = False
    ) -> None:
        """Begin to save the state after `step` steps; returns once it is copied: training may go on at once.

        tensors: nested dicts of tensors and DTensors, plain ones alike on all ranks. facts: JSON-able. best: this is
        the best so far and stays. An earlier save is waited for; a step that is already there is replaced.
        Raises UserError, on every rank, for the earlier save's failure; with `wait` for this one's.
        """
        self.wait()
        writer = _Writer(self.folder, step, json.dumps(facts, indent=2), best, self._ranks.is_main, self._prune)
        staged = BlockingAsyncStager().stage({name: tensor.detach() for name, tensor in _flat(tensors).items()})
        self._thread = threading.Thread(target=self._write, args=(staged, writer), name="checkpoint")
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the save under way has ended. Raises UserError, on every rank, if it failed: older ones are intact."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return self._newest(_complete)

    def best(self) -> Path | None:
        """The checkpoint last saved as the best, or None."""
        return self._newest(_best)

    def facts(self, path: str | Path) -> dict[str, Any]:
        """What was given as `facts` to the save of the checkpoint `path`. Raises UserError if unreadable."""
        return read_facts(path)

    def load(self, path: str | Path, tensors: dict[str, Any], *, strict: bool = True) -> dict[str, Any]:
        """Fill `tensors` in place from the checkpoint `path`, saved by any number of ranks; returns its facts.

        strict: the checkpoint must hold nothing else. Raises UserError for an unreadable checkpoint, and for entries
        that are missing, left over, or of another shape or dtype; `tensors` may then be filled in part.
        """
        path, wanted = Path(path), _flat(tensors)
        with self._ranks.together():
            facts = read_facts(path)
            metadata = tensor_index.read_index(path)
            _check_entries(path, metadata.state_dict_metadata, wanted, strict)
        try:
            dcp.load(
                wanted,
                storage_reader=tensor_index.IndexedReader(path, metadata),
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._ranks.control,
                no_dist=self._ranks.count == 1,
            )
        except dcp.CheckpointException as error:
            raise UserError(f"checkpoint: cannot read {path}: {first_line(_first_failure(error))}") from error
        return facts

    def _newest(self, find: Callable[[Path], dict[int, Path]]) -> Path | None:
        with self._ranks.together():
            found = find(self.folder) if self._ranks.is_main else {}
        return self._ranks.from_main(found[max(found)] if found else None)

    def _write(self, staged: dict[str, torch.Tensor], writer: _Writer) -> None:
        """The background's work. What fails on one rank fails on all: each step of it is agreed on by dcp.save."""
        try:
            dcp.save(
                staged,
                storage_writer=writer,
                planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except BaseException as error:  # CheckpointException is no Exception; and nobody else could hear of any of them
            cause = _first_failure(error) if isinstance(error, dcp.CheckpointException) else error
            if not isinstance(cause, UserError):
                cause = UserError(f"cannot write {writer.final}: {first_line(cause)}; what was saved before is intact")
            self._failure = cause
            if self._ranks.is_main:
                _tidy(self.folder)

    def _prune(self, step: int) -> None:
        """After the save of `step`: the oldest go. Later steps, of a run that was taken up again earlier, stay."""
        steps = sorted(found for found in _complete(self.folder) if found <= step)
        best = max((found for found in _best(self.folder) if found <= step), default=None)
        for old in steps[: -self.keep] if self.keep else []:
            if old != best:
                _remove(self.folder / _name(old))


class _Writer(dcp.FileSystemWriter):
    """Writes one checkpoint beside its place, and moves it there. dcp.save tells every rank of an error on any."""

    def __init__(
        self, folder: Path, step: int, facts: str, best: bool, is_main: bool, after: Callable[[int], None]
    ) -> None:
        self.final = folder / _name(step)
        super().__init__(folder / f".{self.final.name}.part", per_thread_copy_ahead=0)
        self._step, self._facts, self._best, self._is_main, self._after = step, facts, best, is_main, after

    def prepare_local_plan(self, plan):
        if self._is_main:  # the others write when all have planned
            with self._failures():
                self.final.parent.mkdir(parents=True, exist_ok=True)
                _tidy(self.final.parent)
                self.path.mkdir()
        return plan

    def write_data(self, plan, planner):
        with self._failures():
            return super().write_data(plan, planner)

    def finish(self, metadata, results):
        part, final = self.path, self.final
        with self._failures():
            super().finish(metadata, results)
            write_json(part / tensor_index.FILE, tensor_index.describe(metadata, results))
            write_atomic(part / FACTS, lambda file: file.write_text(self._facts, encoding="utf-8"))
            if self._best or (final / BEST).exists():
                (part / BEST).touch()
            _sync(part)
            if final.exists():
                final.rename(final.with_name(f".{final.name}.old"))
            part.rename(final)
            _sync(final.parent)
            _tidy(final.parent)
            self._after(self._step)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch's complaint hides the file's own
            reason = (isinstance(cause, OSError) and cause.strerror) or first_line(error)
            raise UserError(f"cannot write {self.final}: {reason}; what was saved before is intact") from error


def read_facts(path: str | Path) -> dict[str, Any]:
    """The facts of the checkpoint folder `path`. Raises UserError if they are missing or unreadable."""
    file = Path(path) / FACTS
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"checkpoint: {file} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint: cannot read {file}: {first_line(error)}") from None
    if not isinstance(facts, dict):
        raise UserError(f"checkpoint: {file} holds a {type(facts).__name__}, expected an object")
    return facts


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest one of a folder of checkpoints or of a run's
    folder, which has them in `checkpoints/`. Raises UserError if there is none."""
    path = Path(path)
    if (path / FACTS).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        found = _complete(folder)
        if found:
            return found[max(found)]
    what = "holds no complete checkpoint (step-...)" if path.is_dir() else "does not exist, or is no folder"
    raise UserError(f"checkpoint: {path} {what}")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _complete(folder: Path) -> dict[int, Path]:
    """Step -> folder of each complete checkpoint; one about to be replaced counts until its successor is there."""
    named, replaced = {}, {}
    for path in folder.iterdir() if folder.is_dir() else []:
        if (path / FACTS).is_file():
            if match := _NAME.fullmatch(path.name):
                named[int(match[1])] = path
            elif (match := _HIDDEN.fullmatch(path.name)) and match[3] == "old":
                replaced[int(match[2])] = path
    return replaced | named


def _best(folder: Path) -> dict[int, Path]:
    return {step: path for step, path in _complete(folder).items() if (path / BEST).exists()}


def _tidy(folder: Path) -> None:
    """Clear away what a killed or failed save has left."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if match := _HIDDEN.fullmatch(path.name):
            if match[3] == "old" and not (folder / match[1]).exists():
                path.rename(folder / match[1])
            else:
                shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that no half of one has it."""
    hidden = path.with_name(f".{path.name}.part")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flat(tensors: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """{"a": {"b": tensor}} as {"a/b": tensor}."""
    flat: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, DTensor) and value.ndim == 0:
            flat[prefix + name] = value.to_local()  # a scalar has no shards
        elif isinstance(value, torch.Tensor):
            flat[prefix + name] = value
        else:
            raise TypeError(f"{prefix}{name} is a {type(value).__name__}, expected a tensor or a dict of them")
    return flat


def _check_entries(path: Path, saved: dict[str, Any], wanted: dict[str, torch.Tensor], strict: bool) -> None:
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing:
        raise UserError(f"checkpoint: {path} lacks {_some(missing)}")
    if extra and strict:
        raise UserError(f"checkpoint: {path} holds {_some(extra)}, which this run has not")
    for name, tensor in wanted.items():
        found, expected = _kind(saved[name].size, saved[name].properties.dtype), _kind(tensor.shape, tensor.dtype)
        if found != expected:
            raise UserError(f"checkpoint: {path}: {name} is {found}, expected {expected}")


def _kind(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _first_failure(error: dcp.CheckpointException) -> BaseException:
    return error.failures[min(error.failures)][0]
