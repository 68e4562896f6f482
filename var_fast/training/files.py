"""Writing files so that a crash at any moment leaves the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from var_fast.errors import UserError


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    If `write` raises, the temporary file is removed and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """torch.save, atomically."""
    write_atomic(path, lambda part: torch.save(state, part))


def load_state(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a training checkpoint (`kind`: "tokenizer" or "transformer") with weights_only=True.

    Raises UserError if it is missing, unreadable, or of another kind.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint: {path} does not exist") from None
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise UserError(f"checkpoint: cannot read {path}: {str(error).splitlines()[0]}") from None
    found = state.get("kind") if isinstance(state, dict) else None
    if found != kind:
        raise UserError(f"checkpoint: {path} is of kind {found!r}, expected {kind!r}")
    return state
