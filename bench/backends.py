"""Running the library with a chosen backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "VAR_FAST_BACKEND"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every operator runs the backend `name` inside (see var_fast.ops.backend), and the one of before after it.

    An unknown name is found by the first operator that runs, which raises UserError.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
