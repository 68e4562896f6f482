"""Memory on CPUs."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for what comes next, for this process, up to 2 GiB of it.

    By default large tensors go back to the kernel at once, and the next ones come from it page by page, zeroed: of a
    training step, which makes the same tensors anew every time, that took 15 to 25%. False where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    most = 32 * 2**20  # glibc takes no larger one
    return all([mallopt(_MMAP_THRESHOLD, most), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 64 * 2**20)])
