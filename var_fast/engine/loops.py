"""Which sampling loop a model gets: the C++ one where it can stand for the modules."""

from __future__ import annotations

import torch

from var_fast.engine.native_loop import NativeLoop
from var_fast.engine.python_loop import PythonLoop
from var_fast.engine.why_not_native import why_not_native
from var_fast.models import VAR
from var_fast.ops.backend import BackendUnavailable, choose_backend, named_backend


def native_can(var: VAR) -> bool:
    """Whether the native loop can stand for this model as it is now; False too if VAR_FAST_BACKEND asks for the
    reference.

    Raises BackendUnavailable where VAR_FAST_BACKEND asks for the native one and it cannot be.
    """
    if choose_backend("sampling_loop", var.lvl_1L.device) != "native":
        return False
    problem = why_not_native(var)
    if problem and named_backend("auto") == "native":
        raise BackendUnavailable(f"sampling_loop: 'native' (asked for by VAR_FAST_BACKEND) cannot run: {problem}")
    return problem is None


def choose_loop(var: VAR, dtype: torch.dtype, last: NativeLoop | PythonLoop | None = None) -> NativeLoop | PythonLoop:
    """The native loop, or else the one through the modules; `last` again where it is the one and the model the same."""
    asked_for = choose_backend("sampling_loop", var.lvl_1L.device)
    if asked_for == "native" and isinstance(last, NativeLoop) and last.dtype == dtype and last.still_stands():
        return last
    native = native_can(var)
    if not native and isinstance(last, PythonLoop) and last.dtype == dtype:
        return last
    return (NativeLoop if native else PythonLoop)(var, dtype)
