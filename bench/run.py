"""Throughput reports of var_fast beside its peers: python bench/run.py --help. bench/README.md has the method."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

if __name__ == "__main__":
    # Python puts a script's own directory on the path; the modules are imported as bench.<name> from the one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.rows import without_paths  # noqa: E402
from var_fast.cli import run_app  # noqa: E402
from var_fast.errors import UserError  # noqa: E402

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

QUICK_S = 205.0
"""Seconds after which a quick report starts nothing more that is long, so that it ends in less than 4 minutes."""


Suite = Annotated[str, typer.Option(help="Some of ops, tokenize, train, sample, or all.")]
ModelNames = Annotated[
    str | None,
    typer.Option(help="Some of d16, d20, d24, d30, d36-512 (random weights), demo, directories with config.json."),
]
Batch = Annotated[str | None, typer.Option(help="Batch sizes, as in 1,8,64. Default: by model and suite.")]
Dtype = Annotated[
    str, typer.Option(help="Some of float32, bfloat16, float16. auto: float32, and bfloat16 if it is in hardware.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Quick = Annotated[
    bool | None,
    typer.Option("--quick/--full", help="Fewer models and rounds: 4 minutes on 2 CPU cores. Default on a CPU."),
]
Only = Annotated[
    list[str] | None,
    typer.Option(help="Of the operators, those cases only whose name contains this, as in 'scale_attention forward'."),
]
Peers = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME or NAME=PATH, repeatable: compile, flex, sdpa, published=PATH (a checkout of the public VAR "
        "code), hmar=PATH. reference and var_fast are always there. Default: sdpa; on a GPU also compile and flex."
    ),
]
TokenizerFile = Annotated[Path | None, typer.Option(help="The tokenizer's published file, for one published model.")]
TransformerFile = Annotated[Path | None, typer.Option(help="The transformer's published file, with --vae-ckpt.")]
Rounds = Annotated[int | None, typer.Option(min=2, help="Least rounds of each case. Default: 3 quick, 7 full.")]
LeastSeconds = Annotated[
    float | None,
    typer.Option(
        min=0, help="More rounds, to so many seconds a case. Default: 4 quick, 10 full, but 5 times the first calls."
    ),
]
Json = Annotated[Path | None, typer.Option(help="Write the JSON report here too.")]
Compare = Annotated[Path | None, typer.Option(help="An older JSON report, to show what changed since.")]
Out = Annotated[
    Path | None, typer.Option(help="Directory for report.json, report.md, plots. Default: runs/bench/<date and time>.")
]


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def report(
    suite: Suite = "all",
    models: ModelNames = None,
    batch: Batch = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quick: Quick = None,
    only: Only = None,
    peer: Peers = None,
    vae_ckpt: TokenizerFile = None,
    var_ckpt: TransformerFile = None,
    rounds: Rounds = None,
    seconds: LeastSeconds = None,
    json: Json = None,
    compare: Compare = None,
    out: Out = None,
) -> None:
    """Measure sampling, training, tokenizing and each operator, every implementation in turn in one process.

    Prints tables; writes JSON, Markdown and plots. Ctrl-C ends it early and writes what is finished.
    """
    begin = time.monotonic()
    from bench.models import PUBLISHED, check_name
    from bench.output.compare import print_comparison
    from bench.peers.base import load_peer
    from bench.plan import SUITES, plan_dtypes, plan_groups, plan_list, plan_numbers
    from bench.rows import Report
    from var_fast.cli_models import pick_device

    place = pick_device(device)
    quick = place.type == "cpu" if quick is None else quick
    names = None if models is None else list(dict.fromkeys(name.strip() for name in models.split(",")))
    for name in names or ():
        check_name(name)
    if vae_ckpt or var_ckpt:
        if names is None or len(names) != 1 or names[0] not in PUBLISHED:
            raise UserError("--vae-ckpt and --var-ckpt go with one published model, expected --models with its name")
        for option, file in (("--vae-ckpt", vae_ckpt), ("--var-ckpt", var_ckpt)):
            if file is None or not file.is_file():
                raise UserError(f"{option} is {str(file)!r}, expected a file: a model needs both")
    groups = plan_groups(
        plan_list("--suite", None if suite == "all" else suite, SUITES),
        names,
        plan_numbers("--batch", batch),
        place,
        quick,
    )
    dtypes = plan_dtypes(dtype, place)
    defaults = ["sdpa"] if place.type == "cpu" else ["sdpa", "compile", "flex"]
    peers = [
        load_peer(text) for text in dict.fromkeys(["reference", "var_fast", *(defaults if peer is None else peer)])
    ]
    if batch is not None and all(group.suite == "ops" for group in groups):
        raise UserError("--batch goes with the suites tokenize, train and sample; operators have shapes of their own")
    if only and all(group.suite != "ops" for group in groups):
        raise UserError("--only chooses among operators, expected ops among the suites of --suite")
    if only:
        from bench.suites.ops import check_only

        check_only(only, place)
    old = None if compare is None else Report.read(compare)
    if json is not None:
        from var_fast.images import check_writable

        check_writable(json)
    directory = _make_directory(out)

    import torch
    from rich.console import Console

    from bench.machine import environment
    from bench.measure import Method, Seconds
    from bench.nvml import Watch
    from bench.rates import measure as measure_rates
    from bench.session import Session

    # cuDNN would round float32 to TF32, and be compared with what does not
    torch.backends.cudnn.allow_tf32 = False
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)  # events and kernels are recorded on the current device
    notes = []
    if chosen := os.environ.pop("VAR_FAST_BACKEND", None):
        notes.append(f"VAR_FAST_BACKEND={chosen} was left aside: every implementation chooses its own backends")
    console = Console()
    with _progress(len(groups)) as progress, Watch(place) as watch:
        progress("measuring this device", 0)
        session = Session(
            report=Report(environment=environment(place), rates={}, command=_command(), notes=notes),
            device=place,
            dtypes=dtypes,
            peers=peers,
            quick=quick,
            only=only or (),
            method=Method(
                budget_s=seconds if seconds is not None else 4.0 if quick else 10.0,
                least_rounds=rounds or (3 if quick else 7),
                times_warm_up=0.0 if seconds is not None else 5.0,
                deadline=begin + QUICK_S if quick and names is None else float("inf"),
                reference_in_half=not quick,
            ),
            checkpoints=(vae_ckpt, var_ckpt),
            files=[directory / "report.json", *([json] if json else [])],
            spent=Seconds(),
            progress=progress,
        )
        try:
            session.report.rates = measure_rates(place, dtypes)
            session.run(groups)
        except KeyboardInterrupt:
            session.report.interrupted = True
    session.report.environment["nvml"] = watch.to_json()
    session.finish(begin, directory, console)
    if old is not None:
        print_comparison(console, old, session.report)
    if session.report.interrupted:
        raise KeyboardInterrupt


def _make_directory(out: Path | None) -> Path:
    from var_fast.images import check_writable

    directory = out or Path("runs/bench") / datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M%S")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {str(directory)!r}, which cannot be made: {error.strerror}") from None
    check_writable(directory / "report.json")
    return directory


def _command() -> str:
    """The command, fit for a file that others read: of a path, only its last part. With what the environment sets."""
    rows = os.environ.get("VAR_FAST_ONE_LAUNCH_ROWS")
    settings = f"VAR_FAST_ONE_LAUNCH_ROWS={shlex.quote(rows)} " if rows is not None else ""
    return settings + shlex.join(["python", "bench/run.py", *map(without_paths, sys.argv[1:])])


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr; yields the function that shows what goes on and how many groups are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda text, done: progress.update(task, description=text, completed=done)


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    return run_app(app, "bench/run.py", sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
