"""The models and devices that the command line's options name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from var_fast.checkpoint import Checkpoint, load_checkpoint
from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError
from var_fast.layout import PUBLISHED_PATCH_NUMS
from var_fast.models import VAR, VQVAE

PUBLISHED = {"d16": 256, "d20": 256, "d24": 256, "d30": 256, "d36": 512}  # transformer -> image size in pixels


def load_both(model: str, vae_ckpt: Path | None, var_ckpt: Path | None) -> Checkpoint:
    """The models that --model, --vae-ckpt and --var-ckpt name. Raises UserError."""
    published = _published(model)
    if published is None:
        if vae_ckpt is not None or var_ckpt is not None:
            raise UserError(f"--vae-ckpt and --var-ckpt go with a published model, expected none with --model {model}")
        loaded = load_checkpoint(_directory(model), mapped=True)
        if loaded.var is None:
            raise UserError(f"model {model!r} is a tokenizer only, expected a transformer to sample from")
        return loaded
    if vae_ckpt is None or var_ckpt is None:
        raise UserError(
            f"model {model!r} needs its files: --vae-ckpt vae_ch160v4096z32.pth --var-ckpt var_{published}.pth"
        )
    loaded = load_checkpoint(var_ckpt, vae=vae_ckpt, mapped=True)
    var = loaded.var if isinstance(loaded, Checkpoint) else loaded
    if not isinstance(var, VAR):
        raise UserError(f"--var-ckpt is {str(var_ckpt)!r}, which holds no transformer")
    found, size = f"d{var.depth}", image_size(var.vae_proxy[0])
    if (found, size) != (published, PUBLISHED[published]):
        expected = f"{published} for {PUBLISHED[published]} px"
        raise UserError(f"--var-ckpt is {str(var_ckpt)!r}, {found} for {size} px, expected {expected}")
    return Checkpoint(var.vae_proxy[0], var, None, {})


def load_tokenizer(model: str, vae_ckpt: Path | None) -> VQVAE:
    """The tokenizer that --model or --vae-ckpt names; a file alone is one for 256 px. Raises UserError."""
    if vae_ckpt is None:
        published = _published(model)
        if published is not None:
            raise UserError(f"model {model!r} needs its file: --vae-ckpt vae_ch160v4096z32.pth")
        return VQVAE.from_pretrained(_directory(model))
    published = "d16" if model == "demo" else _published(model)
    if published is None:
        raise UserError(f"--vae-ckpt goes with a published model, expected none with --model {model}")
    loaded = load_checkpoint(vae_ckpt, patch_nums=PUBLISHED_PATCH_NUMS[PUBLISHED[published]])
    return loaded.vae if isinstance(loaded, Checkpoint) else loaded


def _published(model: str) -> str | None:
    """The d16 d16, var_d16 or d16-256; None of anything else."""
    found = re.fullmatch(r"(?:var_)?(d\d\d)(?:-(256|512))?", model)
    if found is None or found[1] not in PUBLISHED or found[2] not in (None, str(PUBLISHED[found[1]])):
        return None
    return found[1]


def model_folder(path: str | Path) -> Path:
    """The folder of the model that a training run made, RUN/model, if `path` is such a run; else `path` itself."""
    inner = Path(path, "model")
    return inner if (inner / "config.json").is_file() and not Path(path, "config.json").exists() else Path(path)


def _directory(model: str) -> str:
    if model == "demo":
        return model
    if os.path.isdir(model):
        return str(model_folder(model))
    if os.path.exists(model):
        raise UserError(f"model {model!r} is a file, expected a directory, or d16 with --vae-ckpt FILE --var-ckpt FILE")
    names = ["demo", *PUBLISHED]
    raise UserError(f"model {model!r} is unknown, expected a directory with config.json or one of {', '.join(names)}")


def image_size(vae: VQVAE) -> int:
    """Pixels per side."""
    return vae.quantize.v_patch_nums[-1] * vae.downsample


def pick_device(device: str) -> torch.device:
    """The device that --device names; auto: a GPU if there is one. Raises UserError if it cannot compute here.

    Of the processes that torchrun started here, each gets the GPU of its LOCAL_RANK.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device is {device!r}, expected auto, cpu, cuda, cuda:1 or the like") from None
    if place.type == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        if place.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise UserError(f"--device is {device!r}, expected cuda or auto where several processes share the GPUs")
        if place.index is None:
            place = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    try:
        torch.zeros(1, device=place).item()  # "meta" has shapes but no data
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device is {device!r}, which cannot be used here: {first_line(error)}") from None
    return place
