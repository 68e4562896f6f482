"""The command var-fast export-fid: samples of every class in one .npz file, for FID."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from var_fast import cli_options as opt
from var_fast import cli_work as work

if TYPE_CHECKING:
    from var_fast.engine import Sampler
    from var_fast.evaluation.export_fid import Exported


def export_fid(
    model: opt.Model = "demo",
    vae_ckpt: opt.Vae = None,
    var_ckpt: opt.Var = None,
    per_class: Annotated[int, typer.Option(min=1, help="Images of each class.", rich_help_panel=opt.IMAGES)] = 50,
    interleave: Annotated[
        bool,
        typer.Option(
            "--interleave",
            help="All classes in turn, not one after another: for the evaluator's Inception Score.",
            rich_help_panel=opt.IMAGES,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            help="Image i has the seed SEED * 2^32 + i, and label i // PER_CLASS.", rich_help_panel=opt.IMAGES
        ),
    ] = 0,
    cfg: opt.Cfg = 1.5,
    top_k: opt.TopK = 900,
    top_p: opt.TopP = 0.96,
    more_smooth: opt.MoreSmooth = False,
    out: Annotated[
        Path, typer.Option(help="The .npz file; OUT.parts beside it until all are made.", rich_help_panel=opt.OUTPUT)
    ] = Path("samples.npz"),
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, and replace parts and OUT.", rich_help_panel=opt.OUTPUT)
    ] = False,
    dtype: opt.Dtype = opt.NumberType.auto,
    device: opt.Device = "auto",
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images made at once; default: as the run that is continued, or by size.",
            rich_help_panel=opt.MACHINE,
        ),
    ] = None,
) -> None:
    """Sample images of every class into one .npz file for FID: arr_0, uint8 (N, H, W, 3), in the order of classes.

    With 1000 classes these are the 50,000 images that the ADM evaluator reads.
    On several GPUs: torchrun --nproc_per_node=8 -m var_fast export-fid ...
    The images do not depend on the number of processes.
    Interrupted, the same command goes on where it was.
    """
    from var_fast.cli_models import image_size, load_both, pick_device
    from var_fast.engine import Sampler
    from var_fast.evaluation import export_fid as exporting
    from var_fast.training.ranks import join_ranks

    exporting.check_options(out, per_class, cfg, top_k, top_p, seed)
    with work.termination_interrupts(), join_ranks(pick_device(device)) as ranks:
        vae, var, _, _ = load_both(model, vae_ckpt, var_ckpt)
        if batch is None and not restart:
            batch = exporting.stored_batch(out)
        batch = batch or work.default_batch(image_size(vae), ranks.device.type)
        total = var.num_classes * per_class
        sampler = Sampler(var, dtype=dtype.value, device=ranks.device, max_batch=batch)
        made = 0
        with (
            work.progress("sampling", total, shown=ranks.is_main) as advance,
            work.memory_advice(f"try a --batch below {batch} (and --restart, if there are parts)"),
            work.others_may_end(f"the parts stay in {exporting.parts_folder(out)}, the same command goes on"),
        ):

            def count(images: int) -> None:
                nonlocal made
                made += images
                advance(images)

            try:
                done = exporting.export_fid(
                    sampler,
                    out,
                    per_class=per_class,
                    interleave=interleave,
                    cfg=cfg,
                    top_k=top_k,
                    top_p=top_p,
                    more_smooth=more_smooth,
                    seed=seed,
                    ranks=ranks,
                    restart=restart,
                    advance=count,
                )
            except KeyboardInterrupt:
                kept = f"{made} of {total} images are in {exporting.parts_folder(out)}; the same command goes on"
                raise KeyboardInterrupt(kept if ranks.is_main else "") from None
        if ranks.is_main:
            _print_summary(done, sampler, per_class, image_size(vae), out)


def _print_summary(done: Exported, sampler: Sampler, per_class: int, size: int, out: Path) -> None:
    number_type = str(sampler.dtype).removeprefix("torch.")
    print(f"{done.images} x {size} x {size} pixels, {per_class} of each class, {number_type} on {sampler.device.type}")
    if done.found:
        print(f"{done.found} were there already")
    if done.damaged:
        print(f"{done.damaged} damaged parts were made again")
    print(f"file: {out.absolute()}")
