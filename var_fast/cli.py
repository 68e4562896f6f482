"""The command line: var-fast sample | reconstruct | doctor | train.

torch, and with it everything heavy, is imported inside the commands, so that help and slips of the pen answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from var_fast.cli_arguments import image_name, parse_labels, parse_seeds, spread
from var_fast.errors import UserError

if TYPE_CHECKING:
    import torch

    from var_fast.engine import Sampler


app = typer.Typer(
    name="var-fast",
    help="Images by next-scale prediction (VAR).",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Dtype(str, Enum):
    """Names of number types; auto: bfloat16 where the device computes in it, else float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Upscaling(str, Enum):
    """Ways to enlarge a picture."""

    bicubic = "bicubic"
    nearest = "nearest"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in `arguments` (default: of the process) and returns its exit code, as `run_app` does."""
    return run_app(app, "var-fast", sys.argv[1:] if arguments is None else arguments)


def run_app(commands: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Runs one of `commands` and returns the exit code.

    0: done. 2: bad input. 130: interrupted. The last two say why in one line on stderr.
    """
    try:
        _run(commands, name, list(arguments))
        sys.stdout.flush()
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
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
MODEL, IMAGES, OUTPUT, MACHINE = "Model", "Images", "Output", "Machine"

ModelOption = Annotated[
    str,
    typer.Option(
        help="demo, a directory with config.json, or a published name (d16, d20, d24, d30, d36) with its files.",
        rich_help_panel=MODEL,
    ),
]
VaeOption = Annotated[Path | None, typer.Option(help="File of the published tokenizer.", rich_help_panel=MODEL)]
DeviceOption = Annotated[
    str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)
]
UpscaleOption = Annotated[
    int | None,
    typer.Option(
        min=1, max=64, help="Enlarge every image so many times; default: 4 up to 64 px.", rich_help_panel=OUTPUT
    ),
]


@app.command()
def sample(
    model: ModelOption = "demo",
    vae_ckpt: VaeOption = None,
    var_ckpt: Annotated[
        Path | None, typer.Option(help="File of the published transformer.", rich_help_panel=MODEL)
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes by number or name: 3, 0-7, face-smiling, or several with commas; default: spread over all.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Numbers and ranges with commas.", rich_help_panel=IMAGES)] = "0-15",
    cfg: Annotated[float, typer.Option(help="Guidance at the last scale; 0: none.", rich_help_panel=IMAGES)] = 1.5,
    top_k: Annotated[int, typer.Option(help="Most likely codes kept; 0: all.", rich_help_panel=IMAGES)] = 900,
    top_p: Annotated[float, typer.Option(help="Probability mass kept; 0 or 1: all.", rich_help_panel=IMAGES)] = 0.96,
    more_smooth: Annotated[
        bool,
        typer.Option("--more-smooth", help="Mix codes: smoother pictures, not for metrics.", rich_help_panel=IMAGES),
    ] = False,
    list_labels: Annotated[
        bool, typer.Option("--list-labels", help="Print the model's classes and stop.", rich_help_panel=IMAGES)
    ] = False,
    out: Annotated[Path, typer.Option(help="The picture with all images.", rich_help_panel=OUTPUT)] = Path("grid.png"),
    save_dir: Annotated[
        Path | None, typer.Option(help="Also write each image here, by label and seed.", rich_help_panel=OUTPUT)
    ] = None,
    steps: Annotated[
        bool,
        typer.Option(
            "--steps", help="The picture shows each image (row) after each scale (column).", rich_help_panel=OUTPUT
        ),
    ] = False,
    columns: Annotated[
        int | None,
        typer.Option(min=1, help="Images per row; default: one per label, or a square.", rich_help_panel=OUTPUT),
    ] = None,
    upscale: UpscaleOption = None,
    upscale_mode: Annotated[
        Upscaling, typer.Option(help="How --upscale enlarges.", rich_help_panel=OUTPUT)
    ] = Upscaling.bicubic,
    dtype: Annotated[
        Dtype, typer.Option(help="auto: bfloat16 where the device computes in it.", rich_help_panel=MACHINE)
    ] = Dtype.auto,
    device: DeviceOption = "auto",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images made at once (changes no image); default: by size.", rich_help_panel=MACHINE),
    ] = None,
) -> None:
    """Sample images and write them as one PNG.

    There are as many images as seeds or labels, whichever are more;
    the others are used again in turn: labels 3,5 and seeds 0-3 give 3 0, 5 1, 3 2, 5 3.
    An image depends on its label, seed and options only.
    They are in the text chunks of the PNG.
    """
    seed_list = parse_seeds(seeds)
    _require_png(out)
    if save_dir is not None and os.path.realpath(save_dir) == os.path.realpath(out):
        raise UserError(f"--out and --save-dir are both {str(out)!r}, expected a file and a directory")
    if steps and columns is not None:
        raise UserError("--columns is given beside --steps, whose columns are the scales: expected one of them")
    from var_fast.cli_models import image_size, load_both, pick_device
    from var_fast.engine import Sampler
    from var_fast.images import check_writable, make_grid, make_strip, save_png, squarest
    from var_fast.models.var import check_sampling_options

    check_sampling_options(cfg, top_k, top_p)
    if not list_labels:
        check_writable(out)
        if save_dir is not None:
            _check_folder(save_dir)
        place = pick_device(device)

    vae, var, classes, _ = load_both(model, vae_ckpt, var_ckpt)
    if list_labels:
        for label in range(var.num_classes):
            print(f"{label:>4}  {classes[label]}" if classes else label)
        return
    label_list = spread(var.num_classes) if labels is None else parse_labels(labels, var.num_classes, classes)
    count = max(len(label_list), len(seed_list))
    pairs = [(label_list[i % len(label_list)], seed_list[i % len(seed_list)]) for i in range(count)]

    size = image_size(vae)
    batch = batch or _default_batch(size, place.type)
    sampler = Sampler(var, dtype=dtype.value, device=place, max_batch=batch)
    options = dict(cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth)
    began = time.perf_counter()
    images_per_scale = _sample(sampler, pairs, batch, options, steps)
    seconds = time.perf_counter() - began
    images_B3HW = images_per_scale[-1]
    _require_finite(images_B3HW, "sampled images")

    number_type = str(sampler.dtype).removeprefix("torch.")
    notes = _notes(model, {**options, "dtype": number_type, "device": str(sampler.device)})
    upscale = upscale or _default_upscale(size)
    if steps:
        picture = make_strip(images_per_scale, upscale, mode=upscale_mode.value)
    else:
        one_column_per_label = 1 < len(label_list) <= 16 and len(label_list) < count and count % len(label_list) == 0
        columns = columns or (len(label_list) if one_column_per_label else squarest(count))
        picture = make_grid(images_B3HW, columns, upscale, mode=upscale_mode.value)
    drawn_labels, drawn_seeds = (",".join(map(str, numbers)) for numbers in zip(*pairs))
    if save_dir is not None:
        _make_folder(save_dir)
    save_png(picture, out, {**notes, "label": drawn_labels, "seed": drawn_seeds})
    if save_dir is not None:
        for image_3HW, (label, seed) in zip(images_B3HW, pairs):
            own = {"label": str(label), **({"class": classes[label]} if classes else {}), "seed": str(seed)}
            save_png(image_3HW, save_dir / image_name(label, seed, classes), {**notes, **own})

    print(f"{count} x {size} x {size} pixels on {sampler.device} in {number_type}: {seconds:.2f} s")
    print(f"{seconds / count:.3f} seconds per image")
    print(f"picture: {out.absolute()}")
    if save_dir is not None:
        print(f"images:  {save_dir.absolute()}")


def _sample(
    sampler: Sampler, pairs: list[tuple[int, int]], batch: int, options: dict[str, Any], steps: bool
) -> list[torch.Tensor]:
    """Images (B, 3, H, W) in [0, 1] of the B (label, seed) pairs: one tensor per scale with `steps`, else one only."""
    import torch

    def made(labels: list[int], seeds: list[int]) -> Iterator[torch.Tensor]:
        if steps:
            yield from sampler.stream(labels, seeds, **options)
        else:
            yield sampler.sample(labels, seeds, **options)

    parts: list[list[torch.Tensor]] = []
    scales = len(sampler.var.patch_nums) if steps else 1
    with _progress("sampling", len(pairs) * scales) as advance, _memory_advice(f"try a --batch below {batch}"):
        for start in range(0, len(pairs), batch):
            labels, seeds = (list(numbers) for numbers in zip(*pairs[start : start + batch]))
            parts.append([])
            for images_B3HW in made(labels, seeds):
                parts[-1].append(images_B3HW.cpu())
                advance(len(labels))
    return [torch.cat(scale) for scale in zip(*parts)]


# ---------------------------------------------------------------------------------------------------------- reconstruct
@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures of the tokenizer's size.")],
    model: ModelOption = "demo",
    vae_ckpt: VaeOption = None,
    out: Annotated[
        Path, typer.Option(help="The picture: a row per image, original and reconstruction.", rich_help_panel=OUTPUT)
    ] = Path("reconstruction.png"),
    resize: Annotated[
        bool, typer.Option("--resize", help="Crop the centre square and scale it to the tokenizer's size.")
    ] = False,
    upscale: UpscaleOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Send pictures through the tokenizer: image, tokens, image. Prints the PSNR of each."""
    _require_png(out)
    import torch

    from var_fast.cli_models import image_size, load_tokenizer, pick_device
    from var_fast.images import check_writable, load_image, make_grid, psnr, save_png

    check_writable(out)
    place = pick_device(device)
    vae = load_tokenizer(model, vae_ckpt)
    size = image_size(vae)
    originals_B3HW = torch.stack([load_image(path, size, resize) for path in images])

    batch = _default_batch(size, place.type)
    parts = []
    began = time.perf_counter()
    with _progress("reconstructing", len(images)) as advance, _memory_advice("try --device cpu"):
        vae.to(place)
        for part_B3HW in originals_B3HW.split(batch):
            parts.append(vae.img_to_reconstructed_img(part_B3HW.to(place), last_one=True).float().cpu())
            advance(len(part_B3HW))
    seconds = time.perf_counter() - began
    pairs_B23HW = torch.stack([originals_B3HW, torch.cat(parts)], dim=1).add(1).div(2)
    _require_finite(pairs_B23HW, "reconstructions")

    decibels = [psnr(original, reconstruction) for original, reconstruction in pairs_B23HW]
    notes = {
        **_notes(str(vae_ckpt or model), {"resize": resize, "device": str(place)}),
        "images": json.dumps([path.name for path in images]),
        "psnr": ",".join(f"{value:.2f}" for value in decibels),
    }
    save_png(make_grid(pairs_B23HW.flatten(0, 1), 2, upscale or _default_upscale(size)), out, notes)
    for path, value in zip(images, decibels):
        print(f"{value:6.2f} dB  {path}")
    if len(images) > 1:
        print(f"{sum(decibels) / len(decibels):6.2f} dB  mean")
    print(f"{seconds / len(images):.3f} seconds per image")
    print(f"picture: {out.absolute()}")


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


# -------------------------------------------------------------------------------------------------------------- helpers
def _require_png(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise UserError(f"--out is {str(out)!r}, expected a name that ends in .png")


def _default_batch(size: int, device_type: str) -> int:
    if size <= 64:
        return 64
    return 16 if device_type == "cuda" else 4


def _default_upscale(size: int) -> int:
    return 4 if size <= 64 else 2 if size <= 128 else 1


def _notes(model: str, options: dict[str, Any]) -> dict[str, str]:
    """Text chunks that every picture has."""
    from var_fast import __version__

    return {"Software": f"var_fast {__version__}", "model": model, "options": json.dumps(options)}


def _require_finite(images: torch.Tensor, what: str) -> None:
    if not bool(images.isfinite().all()):
        raise UserError(f"{what} are not finite numbers: check the tokenizer's weights, or try --dtype float32")


@contextlib.contextmanager
def _memory_advice(advice: str) -> Iterator[None]:
    """Turns running out of memory into a UserError."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The CPU's allocator raises a plain RuntimeError, as does nearly everything else in torch.
        words = ("can't allocate memory", "not enough memory")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(w in str(error) for w in words):
            raise
        raise UserError(f"out of memory: {advice}") from None


def _check_folder(folder: Path) -> None:
    """Raises UserError if files could not be written to `folder`, which may still have to be made."""
    from var_fast.images import check_writable

    if os.path.isdir(folder):
        check_writable(folder / "image.png")
    elif os.path.lexists(folder):
        raise UserError(f"--save-dir is {str(folder)!r}, expected a directory")
    else:
        check_writable(folder)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {str(folder)!r}: {error.strerror}") from None


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, gone when done; yields the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
