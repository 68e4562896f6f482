"""What the settings of a run must satisfy, in one place, so that a bad option is one line and not a traceback."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from var_fast.errors import UserError
from var_fast.training.schedule import SHAPES

# Settings of both trainers, by what is expected of them.
_EXPECTED = {
    "1 or more": (
        lambda x: x >= 1,
        "size vocab_size z_channels ch batch depth embed_dim num_heads views min_per_class",
    ),
    "0 or more": (
        lambda x: 0 <= x < math.inf,
        "warmup_steps revive_every skin_variants beta l1 l2 vq weight_decay",
    ),
    "a number above 0": (lambda x: 0 < x < math.inf, "lr clip mlp_ratio"),
    "a number from 0 to 1": (
        lambda x: 0 <= x <= 1,
        "final_lr hold zoom revive_below revive_until cond_drop_rate label_smoothing",
    ),
    "a number from 0 to 1, and below 1": (lambda x: 0 <= x < 1, "ema drop_rate drop_path_rate"),
    "one or more numbers, each 1 or more": (lambda x: len(x) > 0 and min(x) >= 1, "ch_mult"),
    "growing numbers, each 1 or more": (
        lambda x: len(x) > 0 and min(x) >= 1 and list(x) == sorted(set(x)),
        "patch_nums",
    ),
    f"one of {', '.join(SHAPES)}": (lambda x: x in SHAPES, "schedule"),
}


def check_settings(settings: Any) -> None:
    """Raises UserError, naming the setting, if one of TokenizerSettings or TransformerSettings makes no sense."""
    for expected, (holds, names) in _EXPECTED.items():
        for name in names.split():
            # Written so that NaN, which no comparison holds for, is refused.
            if hasattr(settings, name) and not holds(getattr(settings, name)):
                raise UserError(f"{name}: got {getattr(settings, name)!r}, expected {expected}")
    if hasattr(settings, "num_heads") and settings.embed_dim % settings.num_heads:
        raise UserError(f"embed_dim: got {settings.embed_dim}, expected a multiple of num_heads = {settings.num_heads}")


def check_values(settings: Any, expected: dict[str, tuple[Any, str]], choices: dict[str, tuple[str, ...]]) -> None:
    """Raises UserError for the first setting that is not what it should be.

    expected: {words: (predicate, names of settings with spaces between them)}. choices: {name: values}.
    """
    for words, (holds, names) in expected.items():
        for name in names.split():
            if not holds(getattr(settings, name)):  # so that NaN, which no comparison holds for, is refused
                raise UserError(f"{name}: got {getattr(settings, name)!r}, expected {words}")
    for name, values in choices.items():
        if getattr(settings, name) not in values:
            raise UserError(f"{name}: got {getattr(settings, name)!r}, expected one of {', '.join(values)}")


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Around the constructor of `what`: the ValueErrors it raises about its arguments become UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"cannot build {what}: {error}") from None
