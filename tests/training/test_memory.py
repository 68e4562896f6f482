"""keep_freed_memory: counted in page faults, by a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would make the faults of both few
from var_fast.training.memory import keep_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory())
def work():
    return [torch.ones(2**22) * 2 for _ in range(4)]  # of 16 MiB each
for _ in range(10):  # until the heap is as large as its gaps make it, which differs from machine to machine
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    *said, count = done.stdout.split()
    if said == ["False"]:
        pytest.skip("no glibc here")
    return int(count)


def test_freed_memory_is_kept():
    first = 5 * 2**12  # pages of 4 KiB of one round's five tensors
    assert faults("keep") < first < faults("leave")
