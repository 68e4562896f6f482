"""Seconds per sampled image of the published layouts (random weights), ours beside a checkout of the published code.

    python bench/sample.py --depth 16 --batch 1 --published PATH

Both run in one process, in turn, after a warm-up each; medians are printed. First the two are compared: same weights,
same seed, the images must agree to 1e-4.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from var_fast import build_vae_var


def build_published(path: Path, **settings):
    """The published models, without what they print. They switch off torch.nn's initialisation for the whole process:
    so they are built last."""
    sys.path.insert(0, str(path))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            models = importlib.import_module("models")
            return models.build_vae_var(device="cpu", patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), **settings)
    finally:
        sys.path.remove(str(path))


def main(
    depth: Annotated[int, typer.Option(help="Blocks of the transformer: 16, 20, 24 or 30.")] = 16,
    batch: Annotated[int, typer.Option(help="Images a call.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed calls of each implementation.")] = 3,
    published: Annotated[Path | None, typer.Option(help="A checkout of the published code to compare with.")] = None,
) -> None:
    """Time autoregressive_infer_cfg on the CPU in float32 (256 px, cfg 1.5, top_k 900, top_p 0.96)."""
    settings = dict(num_classes=1000, depth=depth, shared_aln=False)
    torch.manual_seed(0)
    vae, var = build_vae_var("cpu", **settings)
    models = {"var_fast": var.eval()}
    if published is not None:
        if not (published / "models" / "var.py").is_file():
            raise SystemExit(f"--published is {published}, expected a checkout with models/var.py in it")
        vae_ref, var_ref = build_published(published, **settings)
        vae_ref.load_state_dict(vae.state_dict())
        var_ref.load_state_dict(var.state_dict())
        models["published"] = var_ref.eval()

    def call(model):
        torch.manual_seed(0)
        labels = torch.arange(batch) % 1000
        return model.autoregressive_infer_cfg(batch, labels, g_seed=0, cfg=1.5, top_k=900, top_p=0.96)

    console = Console()
    images = {name: call(model) for name, model in models.items()}  # the warm-up
    for name, image in images.items():
        error = ((image - images["var_fast"]).norm() / images["var_fast"].norm()).item()
        console.print(f"{name}: relative difference {error:.1e}")
        if error > 1e-4:
            raise SystemExit(f"{name} gives other images: no time is reported")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(repeats), description="timing", console=console):
        for name, model in models.items():
            begin = time.perf_counter()
            call(model)
            seconds[name].append(time.perf_counter() - begin)
    table = Table("implementation", "median s", "min s", "max s", "images/s", "time / var_fast's")
    ours = statistics.median(seconds["var_fast"])
    for name, s in seconds.items():
        median = statistics.median(s)
        table.add_row(
            name, f"{median:.2f}", f"{min(s):.2f}", f"{max(s):.2f}", f"{batch / median:.3f}", f"{median / ours:.2f}"
        )
    console.print(table)
    console.print(f"d{depth}, batch {batch}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    typer.run(main)
