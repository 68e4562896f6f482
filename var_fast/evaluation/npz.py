"""Large arrays of pictures in .npz files, written and read a few at a time.

A zip file checks its own contents (CRC-32). Nothing is ever unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError

MEMBER = "arr_0.npy"


def write_npz(path: Path, shape: tuple[int, ...], arrays: Iterable[np.ndarray], comment: bytes = b"") -> None:
    """Writes what `np.savez(path, arr_0=np.concatenate(arrays))` would, uint8, without holding more than one of them.

    The bytes are a function of the arguments. `comment`: that of the zip file, which np.load passes over. Raises
    ValueError if the arrays do not make up `shape`.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.comment = comment
        # a ZipInfo, and not the name alone, for a date that does not change
        with file.open(zipfile.ZipInfo(MEMBER), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            length = 0
            for array in arrays:
                if array.dtype != np.uint8 or array.shape[1:] != shape[1:]:
                    raise ValueError(f"write_npz: got {array.dtype} {array.shape}, expected uint8 (n, {shape[1:]})")
                member.write(np.ascontiguousarray(array).data)
                length += len(array)
    if length != shape[0]:
        raise ValueError(f"write_npz: got {length} rows, expected {shape[0]}")


def read_comment(path: Path) -> bytes:
    """The comment of a zip file; empty if there is none, or no such file."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.comment
    except Exception:  # zipfile raises whatever the damaged bytes lead to
        return b""


def members(path: Path) -> set[str]:
    """Names of the arrays in an .npz file. Raises UserError."""
    with _named(path), zipfile.ZipFile(path) as file:
        return {name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")}


@contextmanager
def open_pictures(path: Path, batch: int) -> Iterator[Pictures]:
    """The pictures of arr_0 in an .npz file, in order, `batch` at a time.

    Raises UserError if the file cannot be read, or holds something else than uint8 (N, H, W, 3); so does the reading of
    damaged contents.
    """
    with _named(path), zipfile.ZipFile(path) as file:
        if MEMBER not in file.namelist():
            raise UserError(f"{path} holds {', '.join(sorted(file.namelist())) or 'nothing'}, expected arr_0")
        with file.open(MEMBER) as member:
            yield Pictures(path, member, batch)


class Pictures:
    """Pictures as uint8 arrays (b, H, W, 3), once; `shape`: (N, H, W, 3) of the whole file."""

    def __init__(self, path: Path, member: BinaryIO, batch: int):
        self._path, self._member, self._batch = path, member, batch
        self.shape = _read_header(path, member)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.between(0, self.shape[0])

    def between(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Those number `first` to `last` - 1."""
        row = prod(self.shape[1:])
        for _ in range(first):
            self._read(row)
        for start in range(first, last, self._batch):
            count = min(self._batch, last - start)
            yield np.frombuffer(self._read(count * row), dtype=np.uint8).reshape(count, *self.shape[1:])

    def _read(self, count: int) -> bytes:
        with _named(self._path):
            data = self._member.read(count)
        if len(data) != count:
            raise UserError(f"{self._path} is cut short: its header promises {self.shape[0]} pictures")
        return data


def read_part(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """arr_0 of an .npz file if it is whole, undamaged and uint8 of this shape; else None."""
    try:
        with open_pictures(path, shape[0]) as pictures:
            if pictures.shape != shape:
                return None
            (array,) = pictures
            return array
    except UserError:
        return None


def _read_header(path: Path, member: BinaryIO) -> tuple[int, ...]:
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise UserError(f"{path}: arr_0 is in .npy format {version}, expected 1.0 or 2.0")
    shape, fortran, dtype = read(member)
    if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        order = " in Fortran order" if fortran else ""
        raise UserError(f"{path}: arr_0 is {dtype} {shape}{order}, expected uint8 (N, H, W, 3)")
    return shape


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns whatever a bad file leads to into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from None
    except Exception as error:  # zipfile and numpy raise whatever the damaged bytes lead to
        raise UserError(f"cannot read {path}: it is damaged or no .npz file ({first_line(error)})") from None
