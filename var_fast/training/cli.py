"""Commands of `var-fast train`: tokenizer, transformer, export."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from var_fast.cli_models import load_tokenizer, pick_device
from var_fast.errors import UserError
from var_fast.training.loop import Cadence, run_loop
from var_fast.training.memory import keep_freed_memory
from var_fast.training.precision import lacks_products
from var_fast.training.ranks import Ranks, join_ranks
from var_fast.training.recipes import TRANSFORMER_PRESETS
from var_fast.training.schedule import Limits
from var_fast.training.settings import setting, takes_settings
from var_fast.training.tokenizer_settings import TOKENIZER_PRESETS, TokenizerSettings, check_tokenizer_settings
from var_fast.training.transformer_settings import TransformerSettings, check_transformer_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train the tokenizer and the transformer, on one CPU or, started by torchrun, on many GPUs.",
)
RUN, DATA = "The run", "Data"

DATA_HELP = "Folder with train/ and val/ of class folders, or webdataset shards."


@dataclass(frozen=True)
class RunOptions:
    """What both trainers are asked besides their settings."""

    out: Path | None = setting(
        None, "Folder of the run; an unfinished one is continued. By default in runs/", panel=RUN
    )
    steps: int | None = setting(None, "Length of the run in steps.", panel=RUN)
    epochs: float | None = setting(None, "Length of the run in passes over the data.", panel=RUN)
    minutes: float | None = setting(None, "Length by the clock, resumed parts together.", panel=RUN)
    resume: str = setting("auto", "auto (from --out), never, or a run or checkpoint to begin from.", panel=RUN)
    restart: bool = setting(False, "Begin anew and remove the run in --out: --resume never.", panel=RUN)
    save_every: float = setting(300.0, "Seconds between checkpoints; 0: by steps only.", panel=RUN)
    save_every_steps: int = setting(1000, "Steps between checkpoints; 0: by the clock only.", panel=RUN)
    keep: int = setting(3, "Checkpoints kept, besides the best; 0: all.", panel=RUN)
    eval_every_steps: int = setting(1000, "Steps between evaluations; 0: at the end only.", panel=RUN)
    sample_every_steps: int = setting(1000, "Steps between sample pictures; 0: at the end only.", panel=RUN)
    log_every_steps: int = setting(20, "Steps between lines of the log.", panel=RUN)
    tensorboard: bool = setting(True, "Write TensorBoard's files too, if it is installed.", panel=RUN)
    wandb: str | None = setting(None, "Project of Weights & Biases to log to.", panel=RUN)
    threads: int | None = setting(None, "CPU threads, by default PyTorch's choice.", panel=RUN)
    device: str = setting("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...", panel=RUN)
    workers: int = setting(0, "Processes that read pictures; 0: none.", panel=DATA)
    val_images: int | None = setting(None, "Evaluate on so many of the validation images, by default all.", panel=DATA)

    @property
    def cadence(self) -> Cadence:
        """How often what is done. Raises UserError."""
        return Cadence(
            self.save_every,
            self.save_every_steps,
            self.eval_every_steps,
            self.sample_every_steps,
            self.log_every_steps,
            self.keep,
        )

    def length(self, usual: float | None) -> Callable[[int, int], Limits]:
        """The length of the run as a function of (images, batch); `usual` epochs where the user gave none. Raises
        UserError at once for a length that makes no sense."""
        epochs = usual if self.steps is None and self.epochs is None and self.minutes is None else self.epochs

        def limits(images: int, batch: int) -> Limits:
            return Limits.of(self.steps, epochs, self.minutes, images=images, batch=batch)

        limits(1, 1)
        return limits

    def train(self, job: Any, limits: Limits, cadence: Cadence, console: Console) -> None:
        """Runs the loop."""
        precision = job.settings.precision
        if lacks_products(precision, job.ranks.device):
            words = f"warning: precision {precision}: this CPU has no products of it, float32 is likely much faster"
            console.print(words, soft_wrap=True, highlight=False)
        run_loop(
            job,
            self.out or Path("runs", job.kind),
            limits,
            cadence=cadence,
            resume="never" if self.restart else self.resume,
            tensorboard=self.tensorboard,
            wandb=self.wandb,
            console=console,
        )


Preset = Annotated[str, typer.Option(help="Named settings; options given besides it win.")]


def _of_preset(presets: dict[str, dict[str, Any]], preset: str, given: dict[str, Any]) -> dict[str, Any]:
    if preset not in presets:
        raise UserError(f"preset: got {preset!r}, expected one of {', '.join(presets)}")
    return {**presets[preset], **given}


@contextmanager
def _ranks(run: RunOptions) -> Iterator[tuple[Ranks, Console]]:
    """The ranks of the run, and a console that only the main one speaks on."""
    if run.val_images is not None and run.val_images < 1:
        raise UserError(f"val_images: got {run.val_images}, expected 1 or more")
    if run.threads is not None:
        most = 4 * (os.cpu_count() or 1)
        if not 1 <= run.threads <= most:
            raise UserError(f"threads: got {run.threads}, expected 1 to {most}")
        torch.set_num_threads(run.threads)
    with join_ranks(pick_device(run.device)) as ranks:
        if ranks.device.type == "cpu":
            keep_freed_memory()
        yield ranks, Console(quiet=not ranks.is_main)


@app.command()
@takes_settings(run=RunOptions, settings=TokenizerSettings)
def tokenizer(
    data: Annotated[Path, typer.Option(help=DATA_HELP, rich_help_panel=DATA)],
    run: dict[str, Any],
    settings: dict[str, Any],
    preset: Preset = "small",
) -> None:
    """Train the multi-scale tokenizer on images. Stop it with Ctrl-C or SIGTERM; the same command goes on."""
    from var_fast.training.data import open_images
    from var_fast.training.tokenizer import TokenizerJob

    options, chosen = RunOptions(**run), _of_preset(TOKENIZER_PRESETS, preset, settings)
    usual = chosen.pop("epochs", None)
    made = TokenizerSettings(**chosen)
    check_tokenizer_settings(made)
    length, cadence = options.length(usual), options.cadence
    with _ranks(options) as (ranks, console):
        train = open_images(data, "train")
        val = open_images(data, "val", classes=train.classes)
        limits = length(len(train), made.batch)
        job = TokenizerJob(made, train, val, ranks, workers=options.workers, val_images=options.val_images)
        _say_what(console, job.vae, len(train), len(val) if val else 0, limits)
        options.train(job, limits, cadence, console)


@app.command()
@takes_settings(run=RunOptions, settings=TransformerSettings)
def transformer(
    data: Annotated[
        Path,
        typer.Option(
            help="A token cache (var-fast tokenize); or images as for the tokenizer, encoded at every step.",
            rich_help_panel=DATA,
        ),
    ],
    run: dict[str, Any],
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
    enlarge: Annotated[
        float, typer.Option(help="From images: the shorter side before the crop, of the size.", rich_help_panel=DATA)
    ] = 1.125,
    flip: Annotated[bool, typer.Option(help="From images: mirror half of them.", rich_help_panel=DATA)] = False,
    preset: Preset = "small",
) -> None:
    """Train the transformer on a tokenizer's tokens. Stop it with Ctrl-C or SIGTERM; the same command goes on."""
    from var_fast.training.transformer import TransformerJob

    options, chosen = RunOptions(**run), _of_preset(TRANSFORMER_PRESETS, preset, settings)
    usual, patch_nums = (chosen.pop(name, None) for name in ("epochs", "patch_nums"))
    made = TransformerSettings(**chosen)
    check_transformer_settings(made)
    length, cadence = options.length(usual), options.cadence
    with _ranks(options) as (ranks, console):
        vae, source = _open_tokens(data, tokenizer, vae_ckpt, ranks, options, enlarge, flip)
        found = tuple(vae.quantize.v_patch_nums)
        if patch_nums not in (None, found):
            raise UserError(f"preset: {preset} is for a tokenizer with patch_nums {patch_nums}, this one has {found}")
        limits = length(source.images, made.batch)
        job = TransformerJob(made, vae, source, ranks, limits.steps)
        _say_what(console, job.var, source.images, None, limits)
        options.train(job, limits, cadence, console)


def _open_tokens(data, tokenizer, vae_ckpt, ranks, options, enlarge, flip):
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
        source = CachedTokens(cache, options.val_images)
    else:
        if not given:
            raise UserError("tokenizer: got none, expected one beside images (a token cache has its own)")
        vae = load_tokenizer(tokenizer or "demo", vae_ckpt)
        train = open_images(data, "train")
        val = open_images(data, "val", classes=train.classes)
        augmentation = Augmentation(size=image_size(vae), enlarge=enlarge, flip=flip)
        source = EncodedImages(train, val, augmentation, workers=options.workers, held_out_images=options.val_images)
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
