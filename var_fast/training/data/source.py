"""What all places that images come from have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from PIL import Image


class ImageSource(Protocol):
    """N labelled images in a fixed order, read one at a time by any process."""

    classes: list[str]  # names by label
    labels: torch.Tensor  # (N,) int64

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Where image i lies, for messages: a path, or shard:member."""

    def read(self, i: int) -> Image.Image:
        """Image i in RGB, transparency on white. Raises OSError or ValueError where it is corrupt."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the images' names, within the data, and labels: the same wherever the data is moved."""


class Strings:
    """Many strings in two arrays. Millions of objects would cost more, and each worker forked off would copy them."""

    def __init__(self, strings: Iterable[str]):
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        self._ends = np.cumsum([len(s) for s in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        start = self._ends[i - 1] if i else 0
        return self._bytes[start : self._ends[i]].decode("utf-8", "surrogateescape")

    def add_to(self, digest: hashlib._Hash) -> None:
        """The strings and where each ends, into a hash."""
        digest.update(self._ends.tobytes())
        digest.update(self._bytes)


def fingerprint(names: Strings, labels: torch.Tensor, classes: list[str]) -> str:
    """What `ImageSource.fingerprint` returns."""
    digest = hashlib.sha256()
    for strings in (names, Strings(classes)):
        strings.add_to(digest)
    digest.update(labels.numpy().tobytes())
    return digest.hexdigest()
