"""A row of a report, and the report: what the JSON file holds (bench/report.schema.json)."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from var_fast.errors import UserError

SCHEMA = "var_fast benchmark report"
VERSION = 1


def without_paths(text: str) -> str:
    """Of absolute paths only their last parts: a report goes to others."""
    return re.sub(r"(?<![\w.~/-])(?:/[^\s/:,;'\"()]+)+", lambda found: found[0].rsplit("/", 1)[1], text)


@dataclass
class Row:
    """One implementation of one case.

    Times are seconds a call; `floor_s` is the least this device could take, by its own measured rates. `peak_bytes`:
    the most memory a call held beyond what was held before it. `flops` and `bytes`: what the case must compute and
    move, at least. `ratio` of each other implementation: its time over this one's, the median of the ratios of
    neighbouring samples (2.0: this one is twice as fast). `skipped`: why there is no time. `graph`: the time is
    that of a CUDA graph of the call, without launches.
    """

    suite: str
    case: str
    implementation: str
    device: str
    dtype: str
    batch: int
    images: int = 0
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    images_per_s: float | None = None
    floor_s: float | None = None
    peak_bytes: int | None = None
    skipped: str | None = None
    samples: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    ratio: dict[str, float] = field(default_factory=dict)
    joules_per_image: float | None = None
    graph: bool = False

    @property
    def key(self) -> tuple:
        """What makes two rows of two reports comparable."""
        return self.suite, self.case, self.implementation, self.device, self.dtype, self.batch


def ratio_to(row: Row, peer: str) -> float | None:
    """The row's ratio to `peer` in the same type, else to it in float32, else to it in the one type it has; 1 to
    itself, None where there is none."""
    if row.implementation == peer:
        return 1.0
    others = [ratio for label, ratio in row.ratio.items() if label.startswith(f"{peer} ")]
    only = others[0] if len(others) == 1 else None
    return row.ratio.get(peer, row.ratio.get(f"{peer} float32", only))


@dataclass
class Report:
    """`environment`: the machine and the software. `rates`: measured, {"copy_bytes_per_s": x, "flops_per_s":
    {dtype: x}}. `quality`: rows of the quality gate. `timeline`: where a sampled image's time goes. `seconds`: of the
    run itself, {"total", "timed", "warm_up", ...}."""

    environment: dict[str, Any]
    rates: dict[str, Any]
    command: str = ""
    rows: list[Row] = field(default_factory=list)
    quality: list[dict[str, Any]] = field(default_factory=list)
    timeline: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "version": VERSION, **asdict(self)}

    def write(self, path: Path) -> None:
        """Atomically: a reader finds the old file or the whole new one."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises UserError, which names the file, for anything but a report of this version."""
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path}: is not JSON: {error}") from error
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise UserError(f"{path}: is not a report of bench/run.py")
        if (version := content.pop("version", None)) != VERSION:
            raise UserError(f"{path}: is of version {version}, expected {VERSION}")
        try:
            rows = [Row(**row) for row in content.pop("rows")]
            return cls(rows=rows, **content)
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}: has other fields than a report of version {VERSION}: {error}") from error
