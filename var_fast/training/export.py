"""From training checkpoints to a folder that `load_checkpoint` reads, with the numbers for its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from var_fast.checkpoint import load_checkpoint, save_checkpoint
from var_fast.errors import UserError
from var_fast.training.emoji import load_emoji, to_float
from var_fast.training.files import write_json
from var_fast.training.metrics import tokenise, tokenizer_metrics, transformer_metrics, unigram_baseline
from var_fast.training.tokenizer import load_trained_tokenizer
from var_fast.training.transformer import load_pictures, load_trained_transformer, view_batches


def export_checkpoint(
    tokenizer: str | Path,
    transformer: str | Path,
    out: str | Path,
    data: str | Path,
    *,
    best: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write config.json, tokenizer.safetensors, transformer.safetensors and metrics.json into `out`.

    tokenizer, transformer: checkpoint.pt of the two runs; their averaged weights are taken. best: the transformer
    as it was at its lowest held-out loss. The numbers, which are returned too, are those of the written bfloat16
    weights computed with in float32. metrics.json is written last, and an older one removed first, so that it never
    tells of other weights than those beside it. Raises UserError for unreadable checkpoints, a transformer of another
    tokenizer, missing data, unwritable `out`.
    """
    console = console or Console()
    out, transformer = Path(out), Path(transformer)
    vae, tokenizer_settings = load_trained_tokenizer(tokenizer)
    best_path = transformer.with_name("best.pt") if best else None
    var, classes, settings = load_trained_transformer(transformer, vae, best=best_path)
    pictures, source_u8 = load_pictures(data, settings, tokenizer_settings.size)
    if pictures.classes != classes:
        raise UserError(f"data: {data} has other classes than the transformer was trained with")
    _remove_metrics(out / "metrics.json")
    save_checkpoint(out, vae, var, classes=classes, dtype=torch.bfloat16)
    vae, var, _, _ = load_checkpoint(out)

    patch_nums = tuple(vae.quantize.v_patch_nums)
    everything = load_emoji(
        data, tokenizer_settings.size, skin_variants=tokenizer_settings.skin_variants, min_per_class=1
    )
    train = ~pictures.held_out
    train_NL = torch.cat(
        [
            tokenise(vae, view_batches(pictures.images_u8[train], source_u8[train], view, settings.flip, settings.seed))
            for view in range(min(settings.views, 2 if settings.flip else 1))
        ]
    )
    held_u8, held_labels_M = pictures.images_u8[pictures.held_out], pictures.labels[pictures.held_out]
    held_ML = tokenise(vae, (to_float(chunk) for chunk in held_u8.split(64)))
    metrics = {
        "tokenizer": {
            "held_out": tokenizer_metrics(vae, everything.images_u8[everything.held_out]),
            "train": tokenizer_metrics(vae, everything.images_u8[~everything.held_out]),
            "held_out_pictures": int(everything.held_out.sum()),
            "parameters": sum(p.numel() for p in vae.parameters()),
        },
        "transformer": {
            "patch_nums": list(patch_nums),
            "held_out": transformer_metrics(var, vae, held_ML, held_labels_M),
            "unigram": unigram_baseline(train_NL, held_ML, patch_nums, vae.vocab_size),
            "train": transformer_metrics(
                var, vae, train_NL[: int(train.sum())], pictures.labels[train]
            ),  # of the plain views
            "held_out_pictures": len(held_u8),
            "parameters": sum(p.numel() for p in var.parameters()),
        },
    }
    write_json(out / "metrics.json", metrics)
    _show(metrics, console)
    return metrics


def _remove_metrics(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot replace {path}: {error.strerror}") from None


def _show(metrics: dict[str, Any], console: Console) -> None:
    held, train = metrics["tokenizer"]["held_out"], metrics["tokenizer"]["train"]
    console.print(
        f"tokenizer: held-out PSNR {held['psnr_db']:.2f} dB, training PSNR {train['psnr_db']:.2f} dB, "
        f"codes used {train['code_use_percent']:.1f}% by the training pictures",
        soft_wrap=True,
        highlight=False,
    )
    numbers = metrics["transformer"]
    table = Table("scale", "loss", "unigram loss", "accuracy %", "unigram accuracy %", title="transformer, held out")
    for k, pn in enumerate(numbers["patch_nums"]):
        ours, base = numbers["held_out"], numbers["unigram"]
        row = (ours["loss"][k], base["loss"][k], ours["accuracy_percent"][k], base["accuracy_percent"][k])
        table.add_row(f"{pn}x{pn}", *(f"{value:.2f}" for value in row))
    console.print(table)
