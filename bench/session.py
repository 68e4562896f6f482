"""One run of the benchmark: its groups one after the other, the report written after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from bench.machine import last_level_cache_bytes
from bench.measure import Method, Seconds, measure, reason
from bench.models import Models, build
from bench.output.markdown import write_markdown
from bench.output.plots import plots_problem, write_plots
from bench.output.table import print_report
from bench.peers.base import Peer
from bench.plan import Group
from bench.quality import quality_rows
from bench.rows import Report, Row, without_paths
from bench.suites import ops, sample, tokenize, train
from bench.timeline import record
from var_fast import Sampler
from var_fast.engine.sampler import DTYPES
from var_fast.errors import UserError
from var_fast.ops.backend import FAST_BACKENDS


@dataclass
class Session:
    report: Report
    device: torch.device
    dtypes: Sequence[torch.dtype]
    peers: Sequence[Peer]
    quick: bool
    only: Sequence[str]
    method: Method
    checkpoints: tuple[Path | None, Path | None]
    files: Sequence[Path]
    spent: Seconds
    progress: Callable[[str, int], None]
    _models: Models | None = None
    _name: str = ""
    _unwritten: set[Path] = field(default_factory=set)

    def run(self, groups: Sequence[Group]) -> None:
        """The quality gate first, where images are sampled; then `groups`, then the time line of an image. What fails
        leaves a note, and the rest goes on."""
        sampled = [group.model for group in groups if group.suite == "sample"]
        if sampled:
            self._show("quality gate", 0)
            self._try("quality gate", self._pass_gate)
        for done, group in enumerate(groups):
            title = " ".join(filter(None, (group.suite, group.model, group.batch and f"batch {group.batch}")))
            self._try(title, partial(self._run_group, group, title, done))
            self._write()
        if sampled:
            self._show("time line of one image", len(groups))
            self._try("time line", partial(self._record_timeline, sampled[-1]))

    def _run_group(self, group: Group, title: str, done: int) -> None:
        for cases in self._cases(group):
            what = cases[0].name if group.suite == "ops" else title
            on_step = partial(self._show, what, done)
            measure(cases, self.peers, self.report.rates, self.method, self.spent, self.report.rows, on_step)
            self._write()

    def _try(self, what: str, run: Callable[[], None]) -> None:
        try:
            run()
        except Exception as error:
            self.report.notes.append(f"{what} failed: {reason(error)}")

    def _show(self, what: str, done: int, step: str = "") -> None:
        self.progress(f"{what}: {step}" if step else what, done)

    def _cases(self, group: Group):
        """Lists of cases that differ in dtype only."""
        if group.suite == "ops":
            # one at a time: their inputs are large, and are of the case's type
            cache, size = last_level_cache_bytes(self.device), ops.REPORT_SIZE[self.device.type]
            for dtype in self.dtypes:
                for case in ops.cases(self.device, dtype, size, only=self.only, cache_bytes=cache):
                    yield [case]
            alone = [name for name, backends in FAST_BACKENDS.items() if not backends]
            if alone:
                self.report.notes.append(f"only their reference in this version: {', '.join(alone)}")
            return
        models = self._build(group.model)
        common = (models, self.device, self.dtypes, group.batch)
        if group.suite == "sample":
            yield sample.cases(*common)
        elif group.suite == "train":
            if cases := train.cases(*common):
                yield cases
            train.forget_moments()
        else:
            yield tokenize.cases(*common, decode=False)
            yield tokenize.cases(*common, decode=True)

    def _build(self, name: str) -> Models:
        """One model at a time: the large ones fill the memory."""
        if self._name != name:
            self._models, self._name = None, name
            torch.manual_seed(0)
            self._models = build(name, self.device, *self.checkpoints)
        return self._models

    def _record_timeline(self, name: str) -> None:
        models, dtype = self._build(name), self.dtypes[-1]
        dtype_name = next(text for text, known in DTYPES.items() if known == dtype)
        sampler = Sampler(models.var, dtype=dtype_name)
        sampler.sample([1], [0])  # weights are packed, or a graph is captured, once
        title = f"one image of {name}, {dtype_name}, {self.device}"
        self.report.timeline = record(lambda: sampler.sample([1], [0]), self.device, title)

    def _pass_gate(self) -> None:
        modes = [("var_fast", name, "auto") for name, dtype in DTYPES.items() if dtype in self.dtypes]
        images = 12 if self.quick else 64
        self.report.quality = quality_rows(modes, [i % 75 for i in range(images)], list(range(images)), self.device)
        for row in self.report.quality:
            row["skipped"] = row["skipped"] and without_paths(row["skipped"])

    def _write(self) -> None:
        for file in self.files:
            try:
                self.report.write(file)
            except OSError as error:
                if not self._unwritten:
                    self.report.notes.append(f"{file.name} could not be written: {error.strerror}")
                self._unwritten.add(file)
            else:
                self._unwritten.discard(file)

    def finish(self, begin: float, directory: Path, console: Console) -> None:
        """Writes everything and prints the tables; `begin` by time.monotonic(). Raises UserError if the report could
        not be written, after it has been printed."""
        plots: list[Path] = []
        if problem := plots_problem():
            self.report.notes.append(problem)
        if note := _restless(self.report.rows):
            self.report.notes.append(note)
        self._add_up(begin)  # first without the plots: they may be interrupted, too
        self._try("drawing", lambda: plots.extend(write_plots(self.report, directory)))
        self._add_up(begin)
        self._try("report.md", lambda: write_markdown(self.report, directory / "report.md", plots))
        print_report(console, self.report)
        if self._unwritten:
            raise UserError(f"{next(iter(self._unwritten))}: the report could not be written")
        console.print(f"{len(self.report.rows)} rows; report: {directory / 'report.md'}", soft_wrap=True)

    def _add_up(self, begin: float) -> None:
        total = time.monotonic() - begin
        spent = dict(total=total, timed=self.spent.timed, warm_up=self.spent.warm_up)
        self.report.seconds = {**spent, "other": total - self.spent.timed - self.spent.warm_up}
        self._write()


def _restless(rows: Sequence[Row]) -> str | None:
    """A warning where the samples of many rows are far apart: something else used the machine."""
    spreads = sorted(row.p90_s / row.p10_s for row in rows if row.median_s is not None)
    if spreads and spreads[len(spreads) * 3 // 4] > 1.2:
        return (
            f"in a quarter of the rows the 90% sample took {spreads[len(spreads) * 3 // 4]:.1f} times the 10% one or "
            "more: other work may have run on this machine, so take the numbers as rough"
        )
    return None
