"""What is measured: a case, and the implementations that run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class CannotRun(Exception):
    """Why an implementation cannot run a case here, in one line."""


class Wrong(Exception):
    """A result that differs from what it should be, in one line: such an implementation gets no time."""


class Stage(NamedTuple):
    """Work that cannot overlap with the next stage's: operations of the matrix units, and bytes of memory traffic."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """One thing that all implementations do, with the same inputs.

    `suite` and `name` identify it in the report; `images` is how many images a call handles (0: an operator on its
    own). Cases that differ in nothing but dtype are timed together, in turn. `inputs` are several sets of arguments,
    used in turn, so that a call does not find its inputs in the cache. `subject` is what the suite hands to its peers.
    `check(result, expected)` raises Wrong.
    """

    suite: str
    name: str
    device: torch.device
    dtype: torch.dtype
    batch: int
    images: int
    work: Sequence[Stage]
    inputs: Sequence[tuple[Any, ...]]
    subject: Any
    check: Callable[[Any, Any], None]


@dataclass(frozen=True)
class Implementation:
    """`call(*inputs)` runs the case. `expected(*inputs)` is what its result is held to; None: the reference's result.
    `dtype` where it computes in another than the case's. `compiles`: the first call is no measure of the others."""

    call: Callable[..., Any]
    expected: Callable[..., Any] | None = None
    dtype: torch.dtype | None = None
    compiles: bool = False


Implementations = dict[str, Implementation | CannotRun]
"""By name; a CannotRun is listed in the report with its reason."""
