"""What a run writes about itself: log.jsonl, TensorBoard's files, Weights & Biases if asked for."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from var_fast.errors import UserError
from var_fast.training.files import write_atomic

LOG = "log.jsonl"


class RunLog:
    """The log of the main rank, in folder `out`.

    Opened at `step`: what an earlier, killed part of the run logged after that step is taken back, so that the log of a
    resumed run reads like that of an uninterrupted one. Raises UserError where it cannot be written, or `wandb` (the
    name of a project) is asked for and not installed.
    """

    def __init__(self, out: Path, step: int, *, tensorboard: bool = True, wandb: str | None = None) -> None:
        self.path = out / LOG
        self._wandb = _start_wandb(wandb, out) if wandb else None
        if self.path.exists():
            kept = _lines_until(self.path, step)
            write_atomic(self.path, lambda part: part.write_bytes(kept))
        try:
            # Unbuffered: nothing is left to write, and to fail, when it is closed.
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise UserError(f"out: cannot write in {out}: {error.strerror}") from None
        self._board = _tensorboard(out / "tensorboard", step) if tensorboard else None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of `values`: numbers, lists of numbers (one per scale), and dicts of these."""
        try:
            self._file.write((json.dumps({"kind": kind, "step": step, **values}) + "\n").encode())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; the checkpoints saved before are intact"
            ) from error
        flat = dict(_flat(kind, values))
        self._tell_board(lambda board: [board.add_scalar(name, value, step) for name, value in flat.items()])
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def write_picture(self, name: str, path: Path, step: int) -> None:
        """Shows the PNG at `path` in TensorBoard."""
        if self._board is None:
            return
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            levels = np.asarray(picture.convert("RGB"))
        self._tell_board(lambda board: board.add_image(name, levels, step, dataformats="HWC"))

    def close(self) -> None:
        """Writes out what TensorBoard and Weights & Biases hold back."""
        self._file.close()
        self._tell_board(lambda board: board.close())
        if self._wandb is not None:
            self._wandb.finish()

    def _tell_board(self, tell: Callable[[Any], Any]) -> None:
        """TensorBoard's files are a second copy: a full disk ends them, not the run."""
        try:
            if self._board is not None:
                tell(self._board)
        except OSError as error:
            self._board = None
            print(f"warning: no more TensorBoard files, cannot write them: {error.strerror}", file=sys.stderr)


def _lines_until(path: Path, step: int) -> bytes:
    """The lines of a log up to `step`; a line that a kill cut off is dropped."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            found = json.loads(line)["step"]
        except (ValueError, LookupError, TypeError):
            continue
        if line.endswith(b"\n") and found <= step:
            kept.append(line)
    return b"".join(kept)


def _flat(name: str, value: Any):
    """("eval/per_scale/loss/3", number) of every number in nested dicts and lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}/{key}", inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(f"{name}/{number}", inner)
    elif isinstance(value, (int, float)):
        yield name, value


def _tensorboard(folder: Path, step: int):
    """A writer that hides what an earlier part of the run logged after `step`; None without tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(str(folder), purge_step=step + 1)
    except OSError as error:
        raise UserError(f"out: cannot write in {folder}: {error.strerror}") from None


def _start_wandb(project: str, out: Path):
    try:
        import wandb
    except ImportError:
        raise UserError(
            "wandb: Weights & Biases is not installed; pip install wandb, or leave the option out"
        ) from None
    place = hashlib.sha256(str(out.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return wandb.init(project=project, name=out.name, dir=str(out), id=place, resume="allow")
