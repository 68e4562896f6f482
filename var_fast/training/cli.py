"""Commands of `var-fast train`: tokenizer, transformer, export."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from var_fast.cli_models import load_tokenizer, pick_device
from var_fast.errors import UserError
from var_fast.training.loop import Cadence, run_loop
from var_fast.training.ranks import Ranks, join_ranks
from var_fast.training.recipes import TRANSFORMER_PRESETS
from var_fast.training.schedule import Limits
from var_fast.training.settings import takes_settings
from var_fast.training.tokenizer_settings import TOKENIZER_PRESETS, TokenizerSettings, check_tokenizer_settings
from var_fast.training.transformer_settings import TransformerSettings, check_transformer_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train the tokenizer and the transformer, on one CPU or, started by torchrun, on many GPUs.",
)
RUN, DATA = "The run", "Data"

Out = Annotated[
    Path, typer.Option(help="Folder of the run; an unfinished one there is continued.", rich_help_panel=RUN)
]
Steps = Annotated[int | None, typer.Option(help="Length of the run in steps.", rich_help_panel=RUN)]
Epochs = Annotated[float | None, typer.Option(help="Length of the run in passes over the data.", rich_help_panel=RUN)]
Minutes = Annotated[
    float | None, typer.Option(help="Length of the run by the clock, resumed parts together.", rich_help_panel=RUN)
]
Resume = Annotated[
    str, typer.Option(help="auto (from --out), never, or a run or checkpoint to go on from.", rich_help_panel=RUN)
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Begin anew and remove the run in --out: --resume never.", rich_help_panel=RUN)
]
SaveS = Annotated[float, typer.Option(help="Seconds between checkpoints; 0: by steps only.", rich_help_panel=RUN)]
SaveN = Annotated[int, typer.Option(help="Steps between checkpoints; 0: by the clock only.", rich_help_panel=RUN)]
Keep = Annotated[int, typer.Option(help="Checkpoints kept, besides the best; 0: all.", rich_help_panel=RUN)]
EvalN = Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end only.", rich_help_panel=RUN)]
SampleN = Annotated[int, typer.Option(help="Steps between sample pictures; 0: at the end only.", rich_help_panel=RUN)]
LogN = Annotated[int, typer.Option(help="Steps between lines of the log.", rich_help_panel=RUN)]
Board = Annotated[bool, typer.Option(help="Write TensorBoard's files too, if it is installed.", rich_help_panel=RUN)]
Wandb = Annotated[str | None, typer.Option(help="Project of Weights & Biases to log to.", rich_help_panel=RUN)]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's choice.", rich_help_panel=RUN)]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...", rich_help_panel=RUN)]
Workers = Annotated[int, typer.Option(help="Processes that read pictures; 0: none.", rich_help_panel=DATA)]
ValImages = Annotated[
    int | None,
    typer.Option(min=1, help="Evaluate on so many of the validation images; default: all.", rich_help_panel=DATA),
]
Preset = Annotated[str, typer.Option(help="Named settings; options given besides it win.")]


def _of_preset(presets: dict[str, dict[str, Any]], preset: str, given: dict[str, Any]) -> dict[str, Any]:
    if preset not in presets:
        raise UserError(f"preset: got {preset!r}, expected one of {', '.join(presets)}")
    return {**presets[preset], **given}


@contextmanager
def _ranks(threads: int | None, device: str) -> Iterator[tuple[Ranks, Console]]:
    """The ranks of the run, and a console that only the main one speaks on."""
    if threads is not None:
        most = 4 * (os.cpu_count() or 1)
        if not 1 <= threads <= most:
            raise UserError(f"threads: got {threads}, expected 1 to {most}")
        torch.set_num_threads(threads)
    with join_ranks(pick_device(device)) as ranks:
        yield ranks, Console(quiet=not ranks.is_main)


def _length(
    usual: float | None, steps: int | None, epochs: float | None, minutes: float | None
) -> Callable[[int, int], Limits]:
    """The length of the run as a function of (images, batch); `usual` epochs where the user gave none. Raises UserError
    at once for a length that makes no sense."""
    if steps is None and epochs is None and minutes is None:
        epochs = usual

    def limits(images: int, batch: int) -> Limits:
        return Limits.of(steps, epochs, minutes, images=images, batch=batch)

    limits(1, 1)
    return limits


@app.command()
@takes_settings(TokenizerSettings)
def tokenizer(
    data: Annotated[
        Path,
        typer.Option(help="Folder with train/ and val/ of class folders, or webdataset shards.", rich_help_panel=DATA),
    ],
    settings: dict[str, Any],
    out: Out = Path("runs/tokenizer"),
    preset: Preset = "small",
    steps: Steps = None,
    epochs: Epochs = None,
    minutes: Minutes = None,
    resume: Resume = "auto",
    restart: Restart = False,
    save_every: SaveS = 300.0,
    save_every_steps: SaveN = 1000,
    keep: Keep = 3,
    eval_every_steps: EvalN = 1000,
    sample_every_steps: SampleN = 1000,
    log_every_steps: LogN = 20,
    tensorboard: Board = True,
    wandb: Wandb = None,
    workers: Workers = 0,
    val_images: ValImages = None,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Train the multi-scale tokenizer on images. Stop it with Ctrl-C or SIGTERM; the same command goes on."""
    from var_fast.training.data import open_images
    from var_fast.training.tokenizer import TokenizerJob

    chosen = _of_preset(TOKENIZER_PRESETS, preset, settings)
    length = _length(chosen.pop("epochs", None), steps, epochs, minutes)
    made = TokenizerSettings(**chosen)
    check_tokenizer_settings(made)
    cadence = Cadence(save_every, save_every_steps, eval_every_steps, sample_every_steps, log_every_steps, keep)
    with _ranks(threads, device) as (ranks, console):
        train = open_images(data, "train")
        val = open_images(data, "val", classes=train.classes)
        limits = length(len(train), made.batch)
        job = TokenizerJob(made, train, val, ranks, workers=workers, val_images=val_images)
        _say_what(console, job.vae, len(train), len(val) if val else 0, limits)
        run_loop(
            job,
            out,
            limits,
            cadence=cadence,
            resume="never" if restart else resume,
            tensorboard=tensorboard,
            wandb=wandb,
            console=console,
        )


@app.command()
@takes_settings(TransformerSettings)
def transformer(
    data: Annotated[
        Path,
        typer.Option(
            help="A token cache (var-fast tokenize); or images as for the tokenizer, encoded at every step.",
            rich_help_panel=DATA,
        ),
    ],
    settings: dict[str, Any],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Run or folder of the tokenizer, or demo; default: the one in the token cache.", rich_help_panel=DATA
        ),
    ] = None,
    vae_ckpt: Annotated[
        Path | None, typer.Option(help="File of the published tokenizer.", rich_help_panel=DATA)
    ] = None,
    out: Out = Path("runs/transformer"),
    preset: Preset = "small",
    steps: Steps = None,
    epochs: Epochs = None,
    minutes: Minutes = None,
    resume: Resume = "auto",
    restart: Restart = False,
    save_every: SaveS = 300.0,
    save_every_steps: SaveN = 1000,
    keep: Keep = 3,
    eval_every_steps: EvalN = 1000,
    sample_every_steps: SampleN = 1000,
    log_every_steps: LogN = 20,
    tensorboard: Board = True,
    wandb: Wandb = None,
    workers: Workers = 0,
    val_images: ValImages = None,
    enlarge: Annotated[
        float, typer.Option(help="From images: the shorter side before the crop, of the size.", rich_help_panel=DATA)
    ] = 1.125,
    flip: Annotated[bool, typer.Option(help="From images: mirror half of them.", rich_help_panel=DATA)] = False,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Train the transformer on a tokenizer's tokens. Stop it with Ctrl-C or SIGTERM; the same command goes on."""
    from var_fast.training.transformer import TransformerJob

    chosen = _of_preset(TRANSFORMER_PRESETS, preset, settings)
    length = _length(chosen.pop("epochs", None), steps, epochs, minutes)
    patch_nums = chosen.pop("patch_nums", None)
    made = TransformerSettings(**chosen)
    check_transformer_settings(made)
    cadence = Cadence(save_every, save_every_steps, eval_every_steps, sample_every_steps, log_every_steps, keep)
    with _ranks(threads, device) as (ranks, console):
        vae, source = _open_tokens(data, tokenizer, vae_ckpt, ranks, enlarge, flip, workers, val_images)
        if patch_nums not in (None, tuple(vae.quantize.v_patch_nums)):
            found = tuple(vae.quantize.v_patch_nums)
            raise UserError(f"preset: {preset} is for a tokenizer with patch_nums {patch_nums}, this one has {found}")
        limits = length(source.images, made.batch)
        job = TransformerJob(made, vae, source, ranks, limits.steps)
        _say_what(console, job.var, source.images, None, limits)
        run_loop(
            job,
            out,
            limits,
            cadence=cadence,
            resume="never" if restart else resume,
            tensorboard=tensorboard,
            wandb=wandb,
            console=console,
        )


def _open_tokens(data, tokenizer, vae_ckpt, ranks, enlarge, flip, workers, val_images):
    """(frozen tokenizer on the ranks' device, source of tokens) of a token cache or of images."""
    from var_fast.cli_models import image_size
    from var_fast.training.data import Augmentation, open_images
    from var_fast.training.token_cache import TokenCache, is_token_cache
    from var_fast.training.token_sources import CachedTokens, EncodedImages

    given = tokenizer is not None or vae_ckpt is not None
    if is_token_cache(data):
        with ranks.together():  # one rank looks at all of it
            cache = TokenCache.open(data, verify=ranks.is_main)
        vae = cache.tokenizer()
        if given:
            cache.check_tokenizer(load_tokenizer(tokenizer or "demo", vae_ckpt))
        source = CachedTokens(cache, val_images)
    else:
        if not given:
            raise UserError("tokenizer: got none, expected one beside images (a token cache has its own)")
        vae = load_tokenizer(tokenizer or "demo", vae_ckpt)
        train = open_images(data, "train")
        val = open_images(data, "val", classes=train.classes)
        augmentation = Augmentation(size=image_size(vae), enlarge=enlarge, flip=flip)
        source = EncodedImages(train, val, augmentation, workers=workers, held_out_images=val_images)
    return vae.eval().requires_grad_(False).to(ranks.device), source


def _say_what(console: Console, model: torch.nn.Module, images: int, held_out: int | None, limits: Limits) -> None:
    parts = [f"{images} training images"]
    if held_out is not None:
        parts.append(f"{held_out} held out")
    parts.append(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    if limits.steps:
        parts.append(f"{limits.steps} steps")
    if limits.minutes:
        parts.append(f"{limits.minutes:g} minutes")
    console.print(", ".join(parts), soft_wrap=True, highlight=False)


class SavedType(str, Enum):
    """Number types of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: config.json and .safetensors files.")],
    best: Annotated[
        bool, typer.Option("--best", help="Weights of the best evaluation instead of the last ones.")
    ] = False,
    dtype: Annotated[SavedType, typer.Option(help="Number type of the weights.")] = SavedType.bfloat16,
) -> None:
    """Write a run's averaged weights as a folder for sampling or sharing, in half the size."""
    from var_fast.checkpoint import load_checkpoint, save_checkpoint

    folder = run / ("best" if best else "model")
    if not (folder / "config.json").is_file():
        raise UserError(f"run: {folder} does not exist yet, expected a run that has written it")
    vae, var, classes, _ = load_checkpoint(folder)
    save_checkpoint(out, vae, var, classes=classes, dtype=getattr(torch, dtype.value))
    Console().print(f"written: {out}", soft_wrap=True, highlight=False)
