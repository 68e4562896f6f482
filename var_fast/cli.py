"""The command line: var-fast sample | edit | reconstruct | tokenize | train | export-fid | evaluate | doctor.

torch, and with it everything heavy, is imported inside the commands, so that help and slips of the pen answer at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from var_fast import cli_options as opt
from var_fast import cli_work as work
from var_fast.cli_arguments import parse_labels, parse_seeds, spread
from var_fast.cli_edit import edit
from var_fast.cli_evaluate import app as evaluate
from var_fast.cli_export_fid import export_fid
from var_fast.cli_tokenize import tokenize
from var_fast.errors import UserError

if TYPE_CHECKING:
    import torch

    from var_fast.checkpoint import Checkpoint

app = typer.Typer(
    name="var-fast",
    help="Images by next-scale prediction (VAR).",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in `arguments` (default: of the process) and returns its exit code, as `run_app` does."""
    code = run_app(app, "var-fast", sys.argv[1:] if arguments is None else arguments)
    if arguments is None and code != 0:
        _leave_other_ranks(code)
    return code


def _leave_other_ranks(code: int) -> None:
    """Ends the process at once where others of its run are still joined: threads that wait for one of them, which may
    have been killed, abort it now and then if they are taken down in the usual way."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_app(commands: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Runs one of `commands` and returns the exit code.

    0: done. 2: bad input. 130: interrupted. The last two say why in one line on stderr.
    """
    try:
        _run(commands, name, list(arguments))
        sys.stdout.flush()
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt as stop:
        return _complain(": ".join(filter(None, ("interrupted", str(stop)))), 130)
    except UserError as error:
        return _complain(f"error: {error}", 2)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would try to flush into the closed pipe once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # A mistake in the options. Its class lives in click or inside typer, depending on typer's version.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        hint = f" ({context.command_path} --help)" if context else ""
        return _complain(f"error: {error.format_message()}{hint}", 2)
    return 0


def _run(commands: typer.Typer, name: str, arguments: list[str]) -> None:
    """As calling `commands`, but errors are raised instead of printed."""
    command = typer.main.get_command(commands)
    with command.make_context(name, arguments) as context:
        command.invoke(context)


def _complain(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code


def _show_version(wanted: bool) -> None:
    if wanted:
        from var_fast import __version__

        print(f"var_fast {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _no_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help(), end="")


# --------------------------------------------------------------------------------------------------------------- sample
@app.command()
def sample(
    model: opt.Model = "demo",
    vae_ckpt: opt.Vae = None,
    var_ckpt: opt.Var = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes by number or name: 3, 0-7, face-smiling, or several with commas; default: spread over all.",
            rich_help_panel=opt.IMAGES,
        ),
    ] = None,
    seeds: opt.Seeds = "0-15",
    cfg: opt.Cfg = 1.5,
    top_k: opt.TopK = 900,
    top_p: opt.TopP = 0.96,
    more_smooth: opt.MoreSmooth = False,
    list_labels: Annotated[
        bool, typer.Option("--list-labels", help="Print the model's classes and stop.", rich_help_panel=opt.IMAGES)
    ] = False,
    out: Annotated[Path, typer.Option(help="The picture with all images.", rich_help_panel=opt.OUTPUT)] = Path(
        "grid.png"
    ),
    save_dir: opt.SaveDir = None,
    steps: Annotated[
        bool,
        typer.Option(
            "--steps", help="The picture shows each image (row) after each scale (column).", rich_help_panel=opt.OUTPUT
        ),
    ] = False,
    columns: Annotated[
        int | None,
        typer.Option(min=1, help="Images per row; default: one per label, or a square.", rich_help_panel=opt.OUTPUT),
    ] = None,
    upscale: opt.Upscale = None,
    upscale_mode: opt.UpscaleMode = opt.Upscaling.bicubic,
    dtype: opt.Dtype = opt.NumberType.auto,
    device: opt.Device = "auto",
    batch: opt.Batch = None,
) -> None:
    """Sample images and write them as one PNG.

    There are as many images as seeds or labels, whichever are more;
    the others are used again in turn: labels 3,5 and seeds 0-3 give 3 0, 5 1, 3 2, 5 3.
    An image depends on its label, seed and options only.
    They are in the text chunks of the PNG.
    """
    seed_list = parse_seeds(seeds)
    work.require_png(out, save_dir)
    if steps and columns is not None:
        raise UserError("--columns is given beside --steps, whose columns are the scales: expected one of them")
    from var_fast.cli_models import image_size, load_both, pick_device
    from var_fast.engine import Sampler
    from var_fast.images import make_grid, make_strip, squarest
    from var_fast.models.var import check_sampling_options
    from var_fast.training.ranks import join_ranks

    check_sampling_options(cfg, top_k, top_p)
    if list_labels:
        _print_labels(load_both(model, vae_ckpt, var_ckpt))
        return
    work.check_places(out, save_dir)
    with join_ranks(pick_device(device)) as ranks:
        vae, var, classes, _ = load_both(model, vae_ckpt, var_ckpt)
        label_list = spread(var.num_classes) if labels is None else parse_labels(labels, var.num_classes, classes)
        pairs = work.pair_up(label_list, seed_list)
        count, size = len(pairs), image_size(vae)
        batch = batch or work.default_batch(size, ranks.device.type)
        sampler = Sampler(var, dtype=dtype.value, device=ranks.device, max_batch=batch)
        options = dict(cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth)

        def make(labels: list[int], seeds: list[int]) -> Iterator[torch.Tensor]:
            if steps:
                yield from sampler.stream(labels, seeds, **options)
            else:
                yield sampler.sample(labels, seeds, **options)

        scales = len(var.patch_nums) if steps else 1
        images_per_step, seconds = work.make_images(make, pairs, batch, scales, ranks)
        if not ranks.is_main:
            return
    upscale = upscale or work.default_upscale(size)
    if steps:
        picture = make_strip(images_per_step, upscale, mode=upscale_mode.value)
    else:
        columns = columns or work.columns_by_label(label_list, count) or squarest(count)
        picture = make_grid(images_per_step[-1], columns, upscale, mode=upscale_mode.value)
    texts = work.sampler_notes(model, options, sampler)
    work.write_images(picture, images_per_step[-1], pairs, classes, texts, out, save_dir)
    work.print_summary(sampler, count, size, seconds, out, save_dir)


def _print_labels(loaded: Checkpoint) -> None:
    for label in range(loaded.var.num_classes):
        print(f"{label:>4}  {loaded.classes[label]}" if loaded.classes else label)


app.command()(edit)
app.command()(export_fid)
app.add_typer(evaluate, name="evaluate")


# ---------------------------------------------------------------------------------------------------------- reconstruct
@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures of the tokenizer's size.")],
    model: opt.Model = "demo",
    vae_ckpt: opt.Vae = None,
    out: Annotated[
        Path,
        typer.Option(help="The picture: a row per image, original and reconstruction.", rich_help_panel=opt.OUTPUT),
    ] = Path("reconstruction.png"),
    resize: opt.Resize = False,
    upscale: opt.Upscale = None,
    device: opt.Device = "auto",
) -> None:
    """Send pictures through the tokenizer: image, tokens, image. Prints the PSNR of each."""
    work.require_png(out)
    import torch

    from var_fast.cli_models import image_size, load_tokenizer, pick_device
    from var_fast.images import check_writable, load_image, make_grid, psnr, save_png

    check_writable(out)
    place = pick_device(device)
    vae = load_tokenizer(model, vae_ckpt)
    size = image_size(vae)
    originals_B3HW = torch.stack([load_image(path, size, resize) for path in images])

    batch = work.default_batch(size, place.type)
    parts = []
    began = time.perf_counter()
    with work.progress("reconstructing", len(images)) as advance, work.memory_advice("try --device cpu"):
        vae.to(place)
        for part_B3HW in originals_B3HW.split(batch):
            parts.append(vae.img_to_reconstructed_img(part_B3HW.to(place), last_one=True).float().cpu())
            advance(len(part_B3HW))
    seconds = time.perf_counter() - began
    pairs_B23HW = torch.stack([originals_B3HW, torch.cat(parts)], dim=1).add(1).div(2)
    work.require_finite(pairs_B23HW, "reconstructions")

    decibels = [psnr(original, reconstruction) for original, reconstruction in pairs_B23HW]
    texts = {
        **work.notes(str(vae_ckpt or model), {"resize": resize, "device": str(place)}),
        "images": json.dumps([path.name for path in images]),
        "psnr": ",".join(f"{value:.2f}" for value in decibels),
    }
    save_png(make_grid(pairs_B23HW.flatten(0, 1), 2, upscale or work.default_upscale(size)), out, texts)
    for path, value in zip(images, decibels):
        print(f"{value:6.2f} dB  {path}")
    if len(images) > 1:
        print(f"{sum(decibels) / len(decibels):6.2f} dB  mean")
    print(f"{seconds / len(images):.3f} seconds per image")
    print(f"picture: {out.absolute()}")


app.command()(tokenize)


# -------------------------------------------------------------------------------------------------- doctor and training
@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what this machine has and which backend each operator would use."""
    from var_fast.doctor import print_report, report

    if as_json:
        print(json.dumps(report(), indent=2))
    else:
        from rich.console import Console

        print_report(Console())


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)
def train(context: typer.Context) -> None:
    """Train a tokenizer and a transformer, and export them."""
    # All arguments are handed on: so this module need not import the training code to describe its commands.
    from var_fast.training.cli import app as training

    _run(training, "var-fast train", context.args or ["--help"])
