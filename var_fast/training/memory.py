"""Memory on CPUs."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for what comes next, up to 2 GiB of it, for this process.

    By default tensors go back to the kernel at once, and the next ones come from it page by page, zeroed. A training
    step makes the same tensors anew every time: of the demo model's (batch 32) that took 15%, of d16's (batch 1,
    bfloat16) 25%. Tensors above 32 MiB still go back: glibc allows no more. False where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    most = 32 * 2**20  # glibc takes no larger one
    return all([mallopt(_MMAP_THRESHOLD, most), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 64 * 2**20)])
