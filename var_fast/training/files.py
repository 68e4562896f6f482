"""Writing files so that a crash at any moment leaves the old file or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    If `write` raises, the temporary file is removed and `path` is as it was. Raises UserError for an OSError: a full
    or read-only disk.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot write {path}: {reason}; what was saved before is intact") from error


def replace_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder beside `folder`, then put it in its place; a crash leaves the old or the new one.

    Raises UserError for an OSError.
    """
    folder = Path(folder)
    part, old = (folder.with_name(f".{folder.name}.{word}") for word in ("part", "old"))
    try:
        if old.exists() and not folder.exists():  # a crash between the two renames
            os.replace(old, folder)
        for stale in (part, old):
            shutil.rmtree(stale, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            write(part)
            if folder.exists():
                os.replace(folder, old)
            os.replace(part, folder)
        finally:
            for stale in (part, old):
                shutil.rmtree(stale, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot write {folder}: {reason}; what was saved before is intact") from error


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """torch.save, atomically."""

    def write(part: Path) -> None:
        with open(part, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's complaint hides the file's own
                cause = error.__context__
                raise cause if isinstance(cause, OSError) else OSError(first_line(error)) from None

    write_atomic(path, write)


@contextmanager
def contents_of(path: str | Path) -> Iterator[None]:
    """Around the use of a checkpoint: entries missing or of another shape are a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"checkpoint: {path} holds other entries than this version expects ({what})") from error


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of a state dict: names, types, shapes and values, wherever and in whatever layout they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
