"""FilePages: weights that are mapped from a checkpoint file leave the memory once they are packed."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

_PAGEOUT = 21  # MADV_PAGEOUT, Linux 5.4: unlike MADV_DONTNEED it keeps pages that were written to


class FilePages:
    """The file mappings of this process as they are now. Where they cannot be known, nothing is ever given back."""

    def __init__(self):
        self._ranges: list[tuple[int, int]] = []
        if sys.platform != "linux":
            return
        try:
            with open("/proc/self/maps") as maps:
                for line in maps:
                    addresses, *_, path = line.split(maxsplit=5)
                    if path.startswith("/"):
                        first, last = (int(address, 16) for address in addresses.split("-"))
                        self._ranges.append((first, last))
        except (OSError, ValueError):
            self._ranges = []

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's values lie in a file."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(first <= begin and end <= last for first, last in self._ranges)

    def give_back(self, tensor: torch.Tensor) -> None:
        """Lets the pages that hold `tensor` go; they are read from the file again when they are needed."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if self.hold(tensor):
            first_page = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            length = end // mmap.PAGESIZE * mmap.PAGESIZE - first_page
            if length > 0:  # refused (an older system, another owner's file): the memory stays in use, no more
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first_page), ctypes.c_size_t(length), _PAGEOUT)
