"""What a checkpoint says about its model: constructor keywords from the names and shapes of its entries.

Only shapes are looked at (and, of the transformer, the small integer buffer `lvl_1L`), so nothing large is built to
find out that a file is wrong. Names are those of the published code (VAR, Tian et al. 2024).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from math import isqrt
from typing import Any

import torch

from var_fast.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

PARTS = ("tokenizer", "transformer")
HIT_COUNTS = "quantize.ema_vocab_hit_SV"
MAX_TOKENS = 2**15  # the published pyramid for 1024 px has 9451

# The published pyramids of token maps, by image size in pixels (VAR, appendix on implementation).
PUBLISHED_PATCH_NUMS: dict[int, tuple[int, ...]] = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded or saved: the message names the file and the first wrong entry."""


def kind_of(names: Iterable[str]) -> str | None:
    """Whose entries these are, "tokenizer" or "transformer"; None if they are neither's."""
    for name in names:
        if name.startswith(("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")):
            return "tokenizer"
        if name.startswith(("pos_start", "pos_1LC", "word_embed.", "class_emb.", "blocks.", "head.", "head_nm.")):
            return "transformer"
    return None


def tokenizer_keywords(shapes: Shapes, where: str) -> dict[str, Any]:
    """Keywords of VQVAE. `v_patch_nums` is left out if the number of scales fits no published pyramid.

    Shapes do not show `quant_resi` (unless there is no phi at all), `using_znorm`, `beta` and `dropout`, nor which of
    two pyramids with equally many scales was used: 10 scales are read as the 256 px one.
    """
    ch = _shape(shapes, "encoder.conv_in.weight", 4, where)[0]
    vocab_size, z_channels = _shape(shapes, "quantize.embedding.weight", 2, where)
    keywords: dict[str, Any] = dict(
        vocab_size=vocab_size,
        z_channels=z_channels,
        ch=ch,
        ch_mult=[],
        quant_conv_ks=_shape(shapes, "quant_conv.weight", 4, where)[3],
    )
    for level in range(_count(shapes, r"encoder\.down\.(\d{1,4})\.")):
        name = f"encoder.down.{level}.block.0.conv1.weight"
        width = _shape(shapes, name, 4, where)[0]
        if ch == 0 or width % ch:
            raise CheckpointError(f"{where}: {name} has {width} channels, expected a multiple of {ch}")
        keywords["ch_mult"].append(width // ch)
    phi_layers = _count(shapes, r"quantize\.quant_resi\.qresi_ls\.(\d{1,4})\.")
    phi_per_scale = _count(shapes, r"quantize\.quant_resi\.(\d{1,4})\.")
    if phi_layers:
        keywords["share_quant_resi"] = phi_layers
    elif phi_per_scale:
        keywords.update(share_quant_resi=0, default_qresi_counts=phi_per_scale)
    elif "quantize.quant_resi.qresi.weight" in shapes:
        keywords["share_quant_resi"] = 1
    else:
        keywords["quant_resi"] = 0.0
    scales = phi_per_scale or (*shapes.get(HIT_COUNTS, ()), 0)[0]
    for patch_nums in PUBLISHED_PATCH_NUMS.values():
        if len(patch_nums) == scales:
            keywords.setdefault("v_patch_nums", list(patch_nums))
    return keywords


def transformer_keywords(shapes: Shapes, where: str, lvl_1L: torch.Tensor | None = None) -> dict[str, Any]:
    """Keywords of VAR.

    `patch_nums` is exact where `lvl_1L` (1, L), the scale of each token, is at hand, else that of the published pyramid
    with as many tokens and scales, else left out. `num_heads` is left out where plain attention hides it: not with
    L2-normalised attention, nor in the published proportion of `depth` heads of 64 channels.
    Shapes do not show the drop rates and `norm_eps`.
    """
    embed_dim = _shape(shapes, "pos_start", 3, where)[2]
    depth = _count(shapes, r"blocks\.(\d{1,4})\.")
    hidden = _shape(shapes, "blocks.0.ffn.fc1.weight", 2, where)[0]
    if embed_dim == 0:
        raise CheckpointError(f"{where}: pos_start has no channels, expected shape (1, first_l, embed_dim)")
    keywords: dict[str, Any] = dict(
        num_classes=_shape(shapes, "class_emb.weight", 2, where)[0] - 1,
        depth=depth,
        embed_dim=embed_dim,
        mlp_ratio=hidden / embed_dim,
        shared_aln="shared_ada_lin.1.weight" in shapes,
        attn_l2_norm="blocks.0.attn.scale_mul_1H11" in shapes,
    )
    if keywords["attn_l2_norm"]:
        keywords["num_heads"] = _shape(shapes, "blocks.0.attn.scale_mul_1H11", 4, where)[1]
    elif embed_dim == 64 * depth:
        keywords["num_heads"] = depth
    if lvl_1L is not None:
        keywords["patch_nums"] = list(patch_nums_of_levels(lvl_1L, where))
    else:
        tokens = _shape(shapes, "pos_1LC", 3, where)[1]
        scales = _shape(shapes, "lvl_embed.weight", 2, where)[0]
        for patch_nums in PUBLISHED_PATCH_NUMS.values():
            if (sum(pn * pn for pn in patch_nums), len(patch_nums)) == (tokens, scales):
                keywords["patch_nums"] = list(patch_nums)
    return keywords


def patch_nums_of_levels(lvl_1L: torch.Tensor, where: str) -> tuple[int, ...]:
    """The pyramid behind `lvl_1L` (1, L): pn * pn tokens of level 0, then of level 1, and so on."""
    if lvl_1L.numel() > MAX_TOKENS or lvl_1L.is_floating_point():
        raise CheckpointError(
            f"{where}: lvl_1L has {lvl_1L.numel()} elements of {lvl_1L.dtype}, expected integers, {MAX_TOKENS} at most"
        )
    levels = lvl_1L.flatten().tolist()
    runs = [(level, len(list(run))) for level, run in groupby(levels)]
    sides = tuple(isqrt(length) for _, length in runs)
    if [level for level, _ in runs] != list(range(len(runs))) or any(s * s != n for s, (_, n) in zip(sides, runs)):
        raise CheckpointError(f"{where}: lvl_1L is no pyramid, expected pn * pn times 0, then pn * pn times 1, ...")
    return sides


def check_keywords(part: str, keywords: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError on the first of a model's keywords that is unknown, of the wrong type or absurd."""
    rules = RULES[part]
    for name, value in keywords.items():
        if name not in rules:
            raise CheckpointError(f"{where}: {part} has no keyword {shown(name)}, expected one of {', '.join(rules)}")
        expected, holds = rules[name]
        if not holds(value):
            raise CheckpointError(f"{where}: {part}: {name} is {shown(value)}, expected {expected}")


def least_elements(part: str, keywords: Mapping[str, Any]) -> int:
    """How many elements the large parameters of such a model have: fewer than all, but within a small factor of all."""
    if part == "tokenizer":
        widths = [keywords["ch"] * mult for mult in keywords["ch_mult"]]
        return sum(8 * 9 * width**2 for width in widths)  # 3x3 convolutions of two blocks down and three up
    C = keywords["embed_dim"]
    products_per_block = 4 * C * C + 2 * C * round(C * keywords["mlp_ratio"])
    return keywords["depth"] * (products_per_block + (0 if keywords["shared_aln"] else 6 * C * C))


def shown(value: Any) -> str:
    """A value from a file, fit for one line of a message."""
    return repr(value)[:80]


def _shape(shapes: Shapes, name: str, dims: int, where: str) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"{where}: {name} is missing, expected {dims} dimensions")
    if len(shapes[name]) != dims:
        raise CheckpointError(f"{where}: {name} has shape {shapes[name]}, expected {dims} dimensions")
    return shapes[name]


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` finds, so that a gap in the numbers is found later."""
    found = (re.match(pattern, name) for name in names)
    return max((1 + int(match[1]) for match in found if match), default=0)


# A rule: what is expected, in words, and the test of it. The ranges only keep absurd files from building absurd models.
Rule = tuple[str, Callable[[Any], bool]]


def _whole(low: int, high: int) -> Rule:
    return f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high


def _number(low: float, high: float) -> Rule:
    return f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high


def _is_wholes(value: Any, high: int) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and 1 <= len(value) <= 64
        and all(type(v) is int and 1 <= v <= high for v in value)
    )


def _is_pyramid(value: Any) -> bool:
    growing = _is_wholes(value, 256) and all(small < large for small, large in zip(value, value[1:]))
    return growing and sum(pn * pn for pn in value) <= MAX_TOKENS


_FLAG: Rule = ("true or false", lambda v: type(v) is bool)
_RATE: Rule = _number(0, 1)
_PYRAMID: Rule = (f"growing whole numbers whose squares add up to {MAX_TOKENS} at most", _is_pyramid)

RULES: dict[str, dict[str, Rule]] = {
    "tokenizer": {
        "vocab_size": _whole(1, 2**20),
        "z_channels": _whole(1, 2**12),
        "ch": _whole(1, 2**12),
        "dropout": _RATE,
        "beta": _number(0, 1e6),
        "using_znorm": _FLAG,
        "quant_conv_ks": _whole(1, 31),
        "quant_resi": _number(-1, 1),
        "share_quant_resi": _whole(0, 64),
        "default_qresi_counts": _whole(0, 64),
        "v_patch_nums": _PYRAMID,
        "test_mode": _FLAG,
        "ch_mult": ("a list of whole numbers from 1 to 64", lambda v: _is_wholes(v, 64) and len(v) <= 8),
    },
    "transformer": {
        "num_classes": _whole(1, 2**20),
        "depth": _whole(1, 256),
        "embed_dim": _whole(1, 2**15),
        "num_heads": _whole(1, 2**10),
        "mlp_ratio": _number(1e-3, 64),
        "drop_rate": _RATE,
        "attn_drop_rate": _RATE,
        "drop_path_rate": _RATE,
        "norm_eps": _number(0, 1),
        "shared_aln": _FLAG,
        "cond_drop_rate": _RATE,
        "attn_l2_norm": _FLAG,
        "patch_nums": _PYRAMID,
        "flash_if_available": _FLAG,
        "fused_if_available": _FLAG,
    },
}
