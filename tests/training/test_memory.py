"""keep_freed_memory: by malloc's own account (page faults are not counted on every kernel), in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, torch
from var_fast.training.memory import keep_freed_memory

class Mallinfo2(ctypes.Structure):  # malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
if not hasattr(libc, "mallinfo2"):
    sys.exit("no glibc of 2.33 or later")
libc.mallinfo2.restype = Mallinfo2

def held():  # bytes malloc has from the kernel, on the heap and mapped one by one
    info = libc.mallinfo2()
    return info.arena + info.hblkhd

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = held()
tensors = [torch.empty(28 * 2**20, dtype=torch.uint8) for _ in range(4)]
during = held()
del tensors
print(during - before, held() - before)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept(keep: bool):
    done = subprocess.run([sys.executable, "-c", PROGRAM, "keep" if keep else "leave"], capture_output=True, text=True)
    if "no glibc" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    during, after = map(int, done.stdout.split())
    four = 4 * 28 * 2**20
    assert during >= four
    assert after >= four if keep else after < four // 4
