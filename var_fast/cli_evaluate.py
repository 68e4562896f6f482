"""The commands var-fast evaluate reconstruction | fid."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from var_fast import cli_options as opt
from var_fast import cli_work as work
from var_fast.errors import UserError

app = typer.Typer(help="Measure reconstructions (PSNR, SSIM, code use) and samples (FID).")

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers here.")]


@app.callback(invoke_without_command=True)
def _no_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")


@app.command()
def reconstruction(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder of pictures, or one with train/ and val/.")],
    model: opt.Model = "demo",
    vae_ckpt: opt.Vae = None,
    split: Annotated[str, typer.Option(help="Of a folder with train/ and val/: which of them.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="So many pictures, evenly over all; default: all.")] = None,
    enlarge: Annotated[
        float, typer.Option(help="The shorter side becomes so many times the model's size; the centre is cut out.")
    ] = 1.0,
    json_file: Json = None,
    device: opt.Device = "auto",
    batch: opt.Batch = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that read pictures; 0: none.", rich_help_panel=opt.MACHINE)
    ] = 0,
) -> None:
    """How well a tokenizer gives pictures back: PSNR, SSIM, and which codes it uses at each scale.

    Under torchrun the processes share the pictures.
    """
    _check_json(json_file)
    from var_fast.cli_models import image_size, load_tokenizer, pick_device
    from var_fast.evaluation.pictures import open_pictures_of
    from var_fast.evaluation.reconstruction import reconstruction_metrics
    from var_fast.training.data import Augmentation, evaluation_batches, to_float
    from var_fast.training.ranks import join_ranks

    source = open_pictures_of(data, split)
    with join_ranks(pick_device(device)) as ranks:
        vae = load_tokenizer(model, vae_ckpt).to(ranks.device)
        size = image_size(vae)
        batch = batch or work.default_batch(size, ranks.device.type)
        whole = -(-min(limit or len(source), len(source)) // ranks.count)
        skipped: list[str] = []

        def batches(advance):
            place = dict(rank=ranks.rank, ranks=ranks.count)
            looks = evaluation_batches(
                source, Augmentation(size, enlarge), batch=batch, limit=limit, workers=workers, **place
            )
            for found in looks:
                skipped.extend(found.skipped)
                yield to_float(found.images_u8)
                advance(len(found))

        with (
            work.progress("reconstructing", whole, shown=ranks.is_main) as advance,
            work.memory_advice(f"try a --batch below {batch}, or --device cpu"),
        ):
            found = reconstruction_metrics(vae, batches(advance), ranks)
        skipped = [name for names in ranks.gather(skipped) for name in names]
        if ranks.is_main:
            if skipped:
                print(f"{len(skipped)} pictures cannot be read and are left out: {skipped[0]} ...", file=sys.stderr)
            _print_reconstruction(found, list(vae.quantize.v_patch_nums))
            _write_json(json_file, {**found, "unreadable": len(skipped)})


@app.command()
def fid(
    samples: Annotated[Path, typer.Argument(metavar="SAMPLES", help="An .npz file or a folder of pictures.")],
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="The same, of real pictures.")],
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TorchScript file: uint8 (B, 3, H, W) to features (B, D). It is a program: use files you trust only.",
        ),
    ] = None,
    json_file: Json = None,
    device: opt.Device = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.", rich_help_panel=opt.MACHINE)] = 64,
) -> None:
    """FID of samples against a reference, with a feature network that you give.

    An .npz file holds pictures (arr_0, uint8 (N, H, W, 3)), as export-fid writes them, or ready statistics (mu, sigma),
    which are taken where a file has both.
    Numbers compare only between runs with the same network.
    Under torchrun the processes share the pictures.
    """
    _check_json(json_file)
    from var_fast.cli_models import pick_device
    from var_fast.evaluation.features import count_pictures, has_statistics, load_feature_network, picture_statistics
    from var_fast.evaluation.fid import fid as distance
    from var_fast.training.ranks import join_ranks

    ready = [has_statistics(source) for source in (samples, reference)]
    if features is None and not all(ready):
        raise UserError("--features is not given, expected a TorchScript file: only of mu and sigma is it not needed")
    with join_ranks(pick_device(device)) as ranks:
        network = None if all(ready) else load_feature_network(features, ranks.device)
        share = sum(count_pictures(source) for source in (samples, reference)) // ranks.count
        with (
            work.progress("pictures", share, shown=ranks.is_main) as advance,
            work.memory_advice(f"try a --batch below {batch}"),
        ):
            of_samples, of_reference = (
                picture_statistics(source, network, batch=batch, ranks=ranks, advance=advance)
                for source in (samples, reference)
            )
            value = distance(of_samples, of_reference)
        if ranks.is_main:
            print(f"FID {value:.4f}")
            _write_json(json_file, {"fid": value, "samples": str(samples), "reference": str(reference)})


def _print_reconstruction(found: dict[str, Any], patch_nums: list[int]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"pictures  {found['images']}")
    print(f"PSNR      {found['psnr_db']:.2f} dB")
    print(f"SSIM      {found['ssim']:.4f}")
    print(f"codes     {found['code_use_percent']:.1f} % used")
    table = Table("scale", "tokens", "codes used %", "perplexity")
    for k, (pn, percent, perplexity) in enumerate(
        zip(patch_nums, found["code_use_percent_per_scale"], found["perplexity_per_scale"])
    ):
        table.add_row(str(k), f"{pn} x {pn}", f"{percent:.1f}", f"{perplexity:.1f}")
    Console().print(table)


def _check_json(file: Path | None) -> None:
    if file is not None:
        from var_fast.images import check_writable

        check_writable(file)


def _write_json(file: Path | None, values: dict[str, Any]) -> None:
    if file is not None:
        from var_fast.training.files import write_json

        write_json(file, values)
