"""One way a kernel is launched, so that it can be compiled without a GPU and its resources read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """`signature`: argument -> "*bf16", "i32", "fp32" ...; "constexpr" for those in `constexprs`. `matrix`: it has
    tl.dot, so its code must use the tensor cores."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False
    divisible_by_16: tuple[str, ...] = field(default=())
    """Integer arguments that are multiples of 16 in this configuration (pointers always are)."""
    targets: tuple[int, ...] = (80, 90, 100)
    """Compute capabilities that it is launched on; it is compiled for no other."""
