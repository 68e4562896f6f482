"""What a report measures where the user leaves it open."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from var_fast.engine.sampler import DTYPES, computes_in_bfloat16
from var_fast.errors import UserError

SUITES = ("ops", "tokenize", "train", "sample")

# model -> suite -> batch sizes; what is missing is not part of the report unless it is named
QUICK: dict[str, dict[str, tuple[int, ...]]] = {
    "demo": {"sample": (1, 4, 16), "train": (8,), "tokenize": (8,)},
    "d16": {"sample": (1,)},
}
FULL_CPU: dict[str, dict[str, tuple[int, ...]]] = {
    "demo": {"sample": (1, 4, 16), "train": (8,), "tokenize": (8,)},
    "d16": {"sample": (1, 4), "train": (1,), "tokenize": (1, 4)},
}
FULL_CUDA: dict[str, dict[str, tuple[int, ...]]] = {
    name: {"sample": (1, 8, 64), "train": (16,), "tokenize": (1, 16)} for name in ("demo", "d16", "d24", "d30")
}
OTHER_BATCHES = {"cpu": (1,), "cuda": (1, 8, 64)}


@dataclass(frozen=True)
class Group:
    """A model's turn in a suite, or the operators' (model None)."""

    suite: str
    model: str | None
    batch: int


def plan_groups(
    suites: list[str], models: list[str] | None, batches: list[int] | None, device: torch.device, quick: bool
) -> list[Group]:
    """The short ones first: a quick report that runs out of time still has them. Models that share a name are built
    once."""
    defaults = QUICK if quick else FULL_CUDA if device.type == "cuda" else FULL_CPU
    groups = [Group("ops", None, 0)] if "ops" in suites else []
    for model in models or defaults:
        for suite in (s for s in SUITES if s in suites and s != "ops"):
            of_model = defaults.get(model, {})
            if batches is None and models is None and suite not in of_model:
                continue
            for batch in batches or of_model.get(suite) or OTHER_BATCHES[device.type]:
                groups.append(Group(suite, model, batch))
    return groups


def plan_dtypes(text: str, device: torch.device) -> list[torch.dtype]:
    """The types of "auto" (float32, and bfloat16 where the device computes in it) or "float32,bfloat16"."""
    if text == "auto":
        return [torch.float32] + ([torch.bfloat16] if computes_in_bfloat16(device) else [])
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DTYPES:
            raise UserError(f"--dtype holds {name!r}, expected auto or some of {', '.join(DTYPES)}")
    return list(dict.fromkeys(DTYPES[name] for name in names))


def plan_list(option: str, text: str | None, allowed: tuple[str, ...]) -> list[str]:
    """The parts of "a,b", each one of `allowed`; all of these where `text` is None."""
    if text is None:
        return list(allowed)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in allowed:
            raise UserError(f"{option} holds {name!r}, expected some of {', '.join(allowed)}")
    return list(dict.fromkeys(names))


def plan_numbers(option: str, text: str | None) -> list[int] | None:
    """The numbers of "1,4,8"; None of None."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isascii() or not part.isdigit() or not 1 <= int(part[:9]) <= 4096:
            raise UserError(f"{option} holds {part!r}, expected numbers from 1 to 4096, as in 1,8,64")
    return list(dict.fromkeys(int(part) for part in parts))
