"""The golden values of the published code: models with the stated weights, and the arrays they must reproduce."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from var_fast import VAR, VQVAE

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("adaln_l2norm", "shared_aln_plain_attn")
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
STD_ONE_FOURTH_FAN = ("pos_start", "pos_1LC", "ada_gss", "class_emb.weight", "lvl_embed.weight")


@dataclass
class GoldenCase:
    name: str
    spec: dict
    arrays: dict[str, torch.Tensor]
    vae: VQVAE
    var: VAR


def golden_weight(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor | None:
    """The weight that follows from an entry's name (tests/golden/README.md); None: a buffer, left as constructed."""
    n = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(size=shape)
    if key.rsplit(".", 1)[-1] in BUFFERS:
        return None
    if key.endswith("scale_mul_1H11"):
        w = np.log(4) + 0.1 * n
    elif key.endswith("embedding.weight"):
        w = n
    elif len(shape) >= 2:
        fan_in = 4 if key.endswith(STD_ONE_FOURTH_FAN) else int(np.prod(shape[1:]))
        w = n / np.sqrt(fan_in)
    elif (".norm" in key and key.endswith("weight")) or key.startswith("norm") or "norm_out.weight" in key:
        w = 1 + 0.1 * n
    else:
        w = 0.1 * n
    return torch.from_numpy(np.asarray(w)).float()


def set_golden_weights(module: torch.nn.Module, seed: int) -> None:
    state = module.state_dict()
    for key, value in state.items():
        weight = golden_weight(key, tuple(value.shape), seed)
        if weight is not None:
            value.copy_(weight)


@cache
def _spec_and_arrays(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    spec = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return spec, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def load_case(name: str) -> GoldenCase:
    """Fresh models (evaluation mode, no class drop) and the arrays of a case."""
    spec, arrays = _spec_and_arrays(name)
    vae = VQVAE(**spec["vqvae"])
    var = VAR(vae_local=vae, **spec["var"])
    set_golden_weights(vae, spec["seed"])
    set_golden_weights(var, spec["seed"])
    var.eval()
    var.cond_drop_rate = 0.0
    return GoldenCase(name, spec, arrays, vae, var)
