"""The models that the suites measure: the published layouts with random weights, the demo, or given checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from var_fast import VAR, VQVAE, build_vae_var
from var_fast.cli_models import load_both
from var_fast.errors import UserError
from var_fast.layout import PUBLISHED_PATCH_NUMS

PUBLISHED = ("d16", "d20", "d24", "d30", "d36-512")


@dataclass(frozen=True)
class Models:
    name: str
    vae: VQVAE
    var: VAR


def check_name(name: str) -> None:
    """Raises UserError for a model that cannot be measured, before anything is built."""
    directory = Path(name)
    if (directory / "config.json").is_file() and not (directory / "transformer.safetensors").is_file():
        raise UserError(f"--models holds {name!r}, a tokenizer only, expected a transformer too")
    if name not in PUBLISHED and name != "demo" and not (directory / "config.json").is_file():
        raise UserError(
            f"--models holds {name!r}, expected {', '.join(PUBLISHED)}, demo, or a directory with config.json"
        )


def build(name: str, device: torch.device, vae_ckpt: Path | None = None, var_ckpt: Path | None = None) -> Models:
    """`name` on `device`, without drop path or dropped labels: these draw random numbers in an order of their own in
    every implementation, and the results of a training step could not be compared.

    Gates and head of random weights are as large as trained ones: with those that training begins with (1e-5, 0.02) a
    block could be left out and no check of the results would see it. Logits deviate by 2.3, as the demo model's do.
    """
    if name not in PUBLISHED or vae_ckpt is not None or var_ckpt is not None:
        loaded = load_both(name, vae_ckpt, var_ckpt)
        vae, var = loaded.vae.to(device), loaded.var.to(device)
    else:
        vae, var = build_vae_var(device, **published_settings(name), init_adaln_gamma=0.5, init_head=4.0)
    var.cond_drop_rate = 0.0
    for block in var.blocks:
        block.drop_path = torch.nn.Identity()
    return Models(Path(name).name, vae.eval(), var)


def published_settings(name: str) -> dict:
    """Keywords of build_vae_var, the same in the published code; the 512 px model shares its modulation."""
    depth, size = int(name[1:3]), 512 if name.endswith("-512") else 256
    return dict(
        depth=depth, shared_aln=size == 512, patch_nums=PUBLISHED_PATCH_NUMS[size], num_classes=1000, attn_l2_norm=True
    )
