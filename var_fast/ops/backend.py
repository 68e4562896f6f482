"""Which implementation an operator runs: the one place where that is decided.

Every operator has a PyTorch reference, which runs on any device. Faster implementations are listed in FAST_BACKENDS.
A backend that was asked for by name, in the call or by the environment variable VAR_FAST_BACKEND, either runs or
raises; only "auto" may choose the reference because nothing faster is there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from var_fast.errors import UserError

CHOICES = ("auto", "reference", "triton", "native")

# operator -> {fast backend: device types it runs on}, the preferred backend first
FAST_BACKENDS: dict[str, dict[str, tuple[str, ...]]] = {
    "adaln_modulate": {"triton": ("cuda",), "native": ("cpu",)},
    "residual_adaln_modulate": {"triton": ("cuda",), "native": ("cpu",)},
    "qk_norm": {"triton": ("cuda",), "native": ("cpu",)},
    "gelu": {"native": ("cpu",)},
    "scale_attention": {"triton": ("cuda",)},
    "codebook_search": {"triton": ("cuda",)},
    "multiscale_quantize": {"triton": ("cuda",)},
    "scale_cross_entropy": {"triton": ("cuda",)},
    "sample_tokens": {"native": ("cpu",)},
    "pyramid_update": {"native": ("cpu",)},
    "group_norm_silu": {"triton": ("cuda",), "native": ("cpu",)},
}

# where a Triton kernel could be no faster than torch's own: VAR_FAST_BACKEND=triton leaves these to the reference
NO_TRITON_WANTED = ("gelu",)

# what is no operator, but chosen in the same way: the loop of var_fast/engine
LOOPS: dict[str, dict[str, tuple[str, ...]]] = {"sampling_loop": {"native": ("cpu", "cuda")}}


_HAS_TRITON = importlib.util.find_spec("triton") is not None  # not imported: that takes a second


class BackendUnavailable(UserError):
    """A backend asked for by name cannot run the operator here."""


def _load_native() -> str | None:
    try:
        import var_fast._C  # noqa: F401
    except ImportError as error:
        return f"the extension var_fast._C is not built or does not load ({error}); run: pip install -e ."
    return None


_NATIVE_PROBLEM = _load_native()  # once: torch.compile cannot look into an import


def native_problem() -> str | None:
    """Why the compiled extension var_fast._C cannot be used, or None if it can."""
    return _NATIVE_PROBLEM


def cuda_problem() -> str | None:
    """Why the compiled extension, if there is one, cannot compute on CUDA; None if it can."""
    from var_fast import _C

    return None if _C.has_cuda() else "built without CUDA; with nvcc and a torch for CUDA run: pip install -e ."


def triton_problem() -> str | None:
    """Why Triton kernels cannot be used, or None if they can."""
    return None if _HAS_TRITON else "triton is not installed; run: pip install triton"


def triton_interprets() -> bool:
    """Whether kernels run in Triton's interpreter: slow, exact, on any device, for tests only."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(
    op: str,
    device: torch.device | str,
    requested: str = "auto",
    native_misfit: Callable[[], str | None] = lambda: None,
) -> str:
    """The backend ("reference", "triton" or "native") that runs operator `op` on tensors of `device`.

    `requested` is the caller's choice; "auto" gives way to the environment variable VAR_FAST_BACKEND.
    `native_misfit` tells why the native implementation cannot take the tensors at hand, or None.

    Raises UserError for an unknown backend name, BackendUnavailable for a backend that was named and cannot run here.
    """
    return _choose(op, torch.device(device).type, requested, native_misfit)[0]


def named_backend(requested: str) -> str:
    """The caller's choice, or the environment's where that is "auto"."""
    return requested if requested != "auto" else os.environ.get("VAR_FAST_BACKEND") or "auto"


def explain(op: str, device_type: str) -> tuple[str, str]:
    """What `choose_backend(op, device_type)` answers, and why, in a few words.

    Raises what `choose_backend` raises, since VAR_FAST_BACKEND counts here too.
    """
    return _choose(op, device_type, "auto")


def _choose(op, device_type, requested, native_misfit=lambda: None) -> tuple[str, str]:
    origin = "asked for in the call" if requested != "auto" else "asked for by VAR_FAST_BACKEND"
    requested = named_backend(requested)
    if requested not in CHOICES:
        raise UserError(f"backend is {requested!r} ({origin}), expected one of {', '.join(CHOICES)}")
    if requested == "reference":
        return "reference", origin
    if requested == "triton" and "VAR_FAST_BACKEND" in origin and op in NO_TRITON_WANTED:
        return "reference", "torch's own kernel is as fast as one in Triton could be"
    if requested != "auto":
        interpreted = requested == "triton" and triton_interprets()
        problem = _problem(op, requested, "cuda" if interpreted else device_type, native_misfit)
        if problem:
            raise BackendUnavailable(f"{op}: backend {requested!r} ({origin}) cannot run on {device_type}: {problem}")
        return requested, origin
    problems = []
    for backend in _backends(op):
        problem = _problem(op, backend, device_type, native_misfit)
        if problem is None:
            return backend, f"the fastest {op} for {device_type}"
        problems.append(f"{backend}: {problem}")
    return "reference", "; ".join(problems) or "nothing faster in this version"


def _backends(op: str) -> dict[str, tuple[str, ...]]:
    return LOOPS[op] if op in LOOPS else FAST_BACKENDS[op]


def _problem(op: str, backend: str, device_type: str, native_misfit) -> str | None:
    devices = _backends(op).get(backend)
    if devices is None:
        return f"{op} has no {backend} implementation in this version"
    if device_type not in devices:
        return f"implemented for {', '.join(devices)} only"
    if backend == "triton":
        return triton_problem()
    return native_problem() or (cuda_problem() if device_type == "cuda" else None) or native_misfit()
