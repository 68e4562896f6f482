"""Builds csrc/cuda with a C++ compiler, for running its kernels on the CPU (host_cuda.h)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.cuda.operators import Operators

HERE = Path(__file__).parent
KERNELS = sorted((HERE.parents[1] / "csrc" / "cuda").glob("*.cu"))
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas")


def build(folder: Path) -> HostOperators:
    """Raises RuntimeError with what the compiler says."""
    as_cpp = ("-DVAR_FAST_ON_HOST", "-include", HERE / "host_cuda.h", "-x", "c++")
    jobs = [(*as_cpp, "-c", source) for source in KERNELS]
    jobs += [("-c", HERE / "host_cuda.cpp"), ("-c", HERE / "entry_points.cpp")]
    objects = [folder / f"{job[-1].stem}.{number}.o" for number, job in enumerate(jobs)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job, to: _run(COMPILER, *FLAGS, *job, "-o", to), jobs, objects))
    library = folder / "host_cuda.so"
    _run(COMPILER, "-shared", "-Wl,-z,defs", *objects, "-o", library)
    return HostOperators(library)


def _run(*command) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


class HostOperators(Operators):
    """Tensors are placed where an access beyond their end (but for the 16 bytes they are rounded to) is a crash."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.host_cuda_fenced.restype = ctypes.c_void_p
        self.library.host_cuda_fenced.argtypes = [ctypes.c_int64]

    def call(self, name, *arguments):
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(*map(self._argument, arguments))
        if message is not None:
            raise RuntimeError(message.decode())

    def size(self, name, *arguments):
        function = getattr(self.library, name)
        function.restype = ctypes.c_int64
        return function(*map(self._argument, arguments))

    def place(self, tensor):
        size = tensor.numel() * tensor.element_size()
        address = self.library.host_cuda_fenced(max(size, 1))
        memory = (ctypes.c_char * max(size, tensor.element_size())).from_address(address)
        placed = torch.frombuffer(memory, dtype=tensor.dtype, count=max(tensor.numel(), 1))[: tensor.numel()]
        return placed.view(tensor.shape).copy_(tensor)

    def set_order(self, order: int):
        """0: threads and blocks first to last, 1: last to first, others: at random, by this seed."""
        self.library.host_cuda_set_order(order)

    @staticmethod
    def _argument(value):
        if isinstance(value, torch.Tensor):
            return ctypes.c_void_p(value.data_ptr())
        if isinstance(value, float):
            return ctypes.c_double(value)
        return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)
