"""The command `var-fast tokenize`: every image's tokens, once, into files that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from var_fast import cli_options as opt
from var_fast import cli_work as work
from var_fast.errors import UserError

if TYPE_CHECKING:
    from var_fast.training.write_token_cache import CacheSummary


def tokenize(
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="A folder with train/<class>/*.png, or one or a pattern of .tar shards."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, or to go on with.")],
    model: Annotated[
        str,
        typer.Option(
            help="demo, a directory with config.json, the run that trained a tokenizer, or a published name.",
            rich_help_panel=opt.MODEL,
        ),
    ] = "demo",
    vae_ckpt: opt.Vae = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pixels; default, and the only one that fits: the model's.", rich_help_panel=opt.MODEL
        ),
    ] = None,
    crops: Annotated[
        int,
        typer.Option(
            min=1, help="Views of a training image: its centre, and random windows.", rich_help_panel=opt.IMAGES
        ),
    ] = 1,
    flips: Annotated[
        bool, typer.Option("--flips", help="Each view mirrored as well.", rich_help_panel=opt.IMAGES)
    ] = False,
    enlarge: Annotated[
        float, typer.Option(help="The shorter side before cutting, in sizes.", rich_help_panel=opt.IMAGES)
    ] = 1.125,
    seed: Annotated[int, typer.Option(help="Of the random windows.", rich_help_panel=opt.IMAGES)] = 0,
    shard_images: Annotated[int, typer.Option(min=1, help="Images per file.", rich_help_panel=opt.OUTPUT)] = 8192,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away the cache in OUT first.", rich_help_panel=opt.OUTPUT)
    ] = False,
    device: opt.Device = "auto",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Views encoded at once; default: by size.", rich_help_panel=opt.MACHINE)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that read images; default: by cores.", rich_help_panel=opt.MACHINE),
    ] = None,
) -> None:
    """Encode every image once, for training that skips the encoder.

    Stopped at any moment, the same command goes on where it was.
    Under torchrun the processes share the work.
    """
    from rich.console import Console

    from var_fast.cli_models import image_size, load_tokenizer, pick_device
    from var_fast.training.ranks import join_ranks
    from var_fast.training.write_token_cache import write_token_cache

    place = pick_device(device)
    vae = load_tokenizer(model, vae_ckpt)
    own = image_size(vae)
    if size not in (None, own):
        raise UserError(f"--size is {size}, expected {own}, the size of the tokenizer's images")
    batch = batch or work.default_batch(own, place.type)
    with join_ranks(place) as ranks, work.memory_advice(f"try a --batch below {batch}"):
        summary = write_token_cache(
            data,
            out,
            vae,
            enlarge=enlarge,
            crops=crops,
            flips=flips,
            batch=batch,
            shard_images=shard_images,
            seed=seed,
            workers=_default_workers() if workers is None else workers,
            restart=restart,
            ranks=ranks,
            console=Console(stderr=True),
        )
        if ranks.is_main:
            _print(summary, out, ranks.count)


def _default_workers() -> int:
    """Few enough to leave the processes that encode a core each."""
    import os

    cores = len(os.sched_getaffinity(0))
    return min(8, max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


def _print(summary: CacheSummary, out: Path, processes: int) -> None:
    images = ", ".join(f"{count} of {split}" for split, count in summary.images.items())
    print(f"images:    {images}")
    if summary.skipped:
        first = summary.skipped[0].encode("utf-8", "replace").decode()  # any byte may be in a file's name
        print(f"skipped:   {len(summary.skipped)} that cannot be read, named in index.json: {first}, ...")
    print(f"sequences: {summary.sequences}, {summary.bytes / 1e6:.1f} MB")
    if summary.encoded:
        share = f" in one of {processes} processes" if processes > 1 else ""
        print(f"speed:     {summary.encoded / summary.seconds:.1f} images/s{share}")
    else:
        print("speed:     nothing was left to do")
    print(f"cache:     {out.absolute()}")
