"""Commands of `var-fast train`: tokenizer, transformer, export."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from var_fast.cli_models import pick_device
from var_fast.errors import UserError
from var_fast.training.loop import Cadence
from var_fast.training.schedule import Limits
from var_fast.training.tokenizer import TokenizerSettings, train_tokenizer
from var_fast.training.transformer import TransformerSettings, train_transformer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Train the tokenizer and the transformer on emoji, and export them.",
)
TOKENIZER, TRANSFORMER = TokenizerSettings(), TransformerSettings()

Data = Annotated[Path, typer.Option(help="Folder written by scripts/fetch_emoji.py.")]
Out = Annotated[Path, typer.Option(help="Folder for checkpoint and log; an unfinished run there is continued.")]
Minutes = Annotated[float | None, typer.Option(help="Length of the run by the clock, resumed parts together.")]
Steps = Annotated[int | None, typer.Option(help="Length of the run in steps.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: PyTorch's choice.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew, and overwrite the run in --out.")]
SaveS = Annotated[float, typer.Option(help="Seconds between checkpoints.")]
EvalS = Annotated[float, typer.Option(help="Seconds between evaluations on held-out pictures; 0: at the end only.")]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.")]
Batch = Annotated[int, typer.Option(help="Pictures per step.")]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        print(" ".join(f"error: {error}".split()), file=sys.stderr)
        raise typer.Exit(2) from None


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{name}: got {text!r}, expected numbers with commas between them, like 1,2,4") from None


def _prepare(threads: int | None, device: str) -> str:
    """Sets the number of threads; the device by its name. Raises UserError."""
    if threads is not None:
        most = 4 * (os.cpu_count() or 1)
        if not 1 <= threads <= most:
            raise UserError(f"threads: got {threads}, expected 1 to {most}")
        torch.set_num_threads(threads)
    return str(pick_device(device))


@app.command()
def tokenizer(
    data: Data = Path("data/emoji"),
    out: Out = Path("runs/tokenizer"),
    minutes: Minutes = None,
    steps: Steps = None,
    size: Annotated[int, typer.Option(help="Pixels per side.")] = TOKENIZER.size,
    ch: Annotated[int, typer.Option(help="Channels at full resolution.")] = TOKENIZER.ch,
    ch_mult: Annotated[str, typer.Option(help="Channel factors, one per resolution.")] = ",".join(
        map(str, TOKENIZER.ch_mult)
    ),
    patch_nums: Annotated[str, typer.Option(help="Side of each scale's token map.")] = ",".join(
        map(str, TOKENIZER.patch_nums)
    ),
    vocab_size: int = TOKENIZER.vocab_size,
    z_channels: int = TOKENIZER.z_channels,
    batch: Batch = TOKENIZER.batch,
    lr: float = TOKENIZER.lr,
    l1: Annotated[float, typer.Option(help="Weight of the mean absolute error.")] = TOKENIZER.l1,
    l2: Annotated[float, typer.Option(help="Weight of the mean squared error.")] = TOKENIZER.l2,
    vq: Annotated[float, typer.Option(help="Weight of the codebook and commitment loss.")] = TOKENIZER.vq,
    revive_every: Annotated[
        int, typer.Option(help="Steps between revivals of dead codes; 0: never.")
    ] = TOKENIZER.revive_every,
    zoom: Annotated[float, typer.Option(help="Probability that a batch is shifted and scaled.")] = TOKENIZER.zoom,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = TOKENIZER.ema,
    channels_last: bool = TOKENIZER.channels_last,
    seed: Seed = TOKENIZER.seed,
    threads: Threads = None,
    device: Device = "cpu",
    save_every: SaveS = 300.0,
    eval_every: EvalS = 300.0,
    restart: Restart = False,
) -> None:
    """Train the tokenizer. Stop it with Ctrl-C or SIGTERM; the same command goes on."""
    with _one_line_errors():
        device = _prepare(threads, device)
        settings = TokenizerSettings(
            size=size,
            vocab_size=vocab_size,
            z_channels=z_channels,
            ch=ch,
            ch_mult=_numbers("ch-mult", ch_mult),
            patch_nums=_numbers("patch-nums", patch_nums),
            batch=batch,
            lr=lr,
            l1=l1,
            l2=l2,
            vq=vq,
            revive_every=revive_every,
            zoom=zoom,
            ema=ema,
            channels_last=channels_last,
            seed=seed,
        )
        limits = Limits(steps, minutes)
        cadence = Cadence(save_every_s=save_every, eval_every_s=eval_every)
        train_tokenizer(data, out, limits, settings, device=device, cadence=cadence, restart=restart, console=Console())


@app.command()
def transformer(
    tokenizer: Annotated[Path, typer.Option(help="checkpoint.pt of the tokenizer's run.")],
    data: Data = Path("data/emoji"),
    out: Out = Path("runs/transformer"),
    minutes: Minutes = None,
    steps: Steps = None,
    depth: int = TRANSFORMER.depth,
    embed_dim: int = TRANSFORMER.embed_dim,
    num_heads: int = TRANSFORMER.num_heads,
    drop_rate: Annotated[float, typer.Option(help="Dropout in attention output and FFN.")] = TRANSFORMER.drop_rate,
    drop_path: Annotated[float, typer.Option(help="Largest rate of stochastic depth.")] = TRANSFORMER.drop_path_rate,
    cond_drop: Annotated[
        float, typer.Option(help="How often the label is hidden, for guidance.")
    ] = TRANSFORMER.cond_drop_rate,
    batch: Batch = TRANSFORMER.batch,
    lr: float = TRANSFORMER.lr,
    schedule: Annotated[
        str, typer.Option(help="cosine, or linear (constant, then straight down).")
    ] = TRANSFORMER.schedule,
    label_smoothing: float = TRANSFORMER.label_smoothing,
    views: Annotated[
        int, typer.Option(help="Views of each picture: plain, mirrored, shifted and scaled ones.")
    ] = TRANSFORMER.views,
    flip: Annotated[bool, typer.Option(help="Mirror every second view.")] = TRANSFORMER.flip,
    skin_variants: Annotated[
        int, typer.Option(help="Skin tones kept of one emoji, besides the yellow one.")
    ] = TRANSFORMER.skin_variants,
    min_per_class: Annotated[int, typer.Option(help="Smaller subcategories are left out.")] = TRANSFORMER.min_per_class,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights.")] = TRANSFORMER.ema,
    seed: Seed = TRANSFORMER.seed,
    threads: Threads = None,
    device: Device = "cpu",
    save_every: SaveS = 300.0,
    eval_every: EvalS = 300.0,
    restart: Restart = False,
) -> None:
    """Train the transformer on a trained tokenizer. Stop it with Ctrl-C or SIGTERM; the same command goes on."""
    with _one_line_errors():
        device = _prepare(threads, device)
        settings = TransformerSettings(
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            drop_rate=drop_rate,
            drop_path_rate=drop_path,
            cond_drop_rate=cond_drop,
            batch=batch,
            lr=lr,
            schedule=schedule,
            label_smoothing=label_smoothing,
            views=views,
            flip=flip,
            skin_variants=skin_variants,
            min_per_class=min_per_class,
            ema=ema,
            tokenizer=str(tokenizer),
            seed=seed,
        )
        limits = Limits(steps, minutes)
        cadence = Cadence(save_every_s=save_every, eval_every_s=eval_every)
        train_transformer(
            data, out, limits, settings, device=device, cadence=cadence, restart=restart, console=Console()
        )


@app.command()
def export(
    tokenizer: Annotated[Path, typer.Option(help="checkpoint.pt of the tokenizer's run.")],
    transformer: Annotated[Path, typer.Option(help="checkpoint.pt of the transformer's run.")],
    out: Annotated[Path, typer.Option(help="Folder for config.json, the two .safetensors files and metrics.json.")],
    data: Data = Path("data/emoji"),
    best: Annotated[bool, typer.Option(help="Weights of the lowest held-out loss instead of the last ones.")] = False,
    threads: Threads = None,
) -> None:
    """Write both models as a bfloat16 checkpoint folder and measure it on held-out pictures."""
    from var_fast.training.export import export_checkpoint

    with _one_line_errors():
        _prepare(threads, "cpu")
        export_checkpoint(tokenizer, transformer, out, data, best=best, console=Console())


if __name__ == "__main__":
    app()
