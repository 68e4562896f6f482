"""What the benchmark must know of an operator; one file for each operator beside this one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import bench.ops
from bench.case import Stage


@dataclass(frozen=True)
class Operator:
    """How one operator of var_fast.ops is measured.

    `shapes` by size: "small" (pytest-benchmark, seconds in all), "quick" (a CPU report: about 5 to 300 ms a call),
    "full" (a GPU report: issue-sized). Each is a dict of keywords that the functions below take, e.g. dict(B=1, L=680,
    C=1024); every one has B, the batch.

    make(shape, dtype, device, generator) -> (args, kwargs) for the operator; random, fresh at every call.
    work(shape, dtype, backward) -> stages: operations of matrix units, and bytes: each input read once, each output
    written once. differentiable: positions in args that get a gradient; () = forward only. float32_only: the models
    never call it in a half type, which would choose other codes.
    compare(result, expected, dtype) raises bench.case.Wrong; `expected` is what `exact` returns for the arguments in
    float64; None: it is the operator's reference. in_place: positions in args that the operator changes; a call of the
    benchmark gives it a copy, and the result is then (result, changed, ...).
    """

    name: str
    shapes: dict[str, Sequence[dict[str, Any]]]
    make: Callable[[dict[str, Any], torch.dtype, torch.device, torch.Generator], tuple[tuple, dict]]
    work: Callable[[dict[str, Any], torch.dtype, bool], list[Stage]]
    compare: Callable[[Any, Any, torch.dtype], None]
    differentiable: tuple[int, ...] = ()
    float32_only: bool = False
    in_place: tuple[int, ...] = ()
    exact: Callable[..., Any] | None = None


def operators() -> list[Operator]:
    """All operators that have a file here, by name. Some files define several: OPERATORS is a list."""
    found = []
    for module in pkgutil.iter_modules(bench.ops.__path__):
        found += getattr(importlib.import_module(f"bench.ops.{module.name}"), "OPERATORS", [])
    return sorted(found, key=lambda operator: operator.name)
