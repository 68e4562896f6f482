"""Images in tar archives, as webdataset writes them: the members KEY.jpg and KEY.cls are one example.

The headers are read once; afterwards every image is read at its own place, in any order.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError
from var_fast.training.data.pixels import SUFFIXES, decode
from var_fast.training.data.source import Strings, fingerprint

LABEL_KINDS = ("cls", "json", "txt")  # the first of them that is there tells the label
LABEL_BYTES = 1 << 20  # a larger member is no label
MOST_CLASSES = 1 << 20


class _Example(NamedTuple):
    key: str
    offset: int
    size: int
    label: int | str


class TarShards:
    """The images of uncompressed tar archives, in their order.

    A key is a member's path up to the first dot of its last part. A label is a number or a class name: the text of
    KEY.cls, "label" of KEY.json, or the number in KEY.txt. classes: names by label, where they are known (as those of
    the training split, or from a file); otherwise the names that are met, sorted, or "0", "1", ... where labels are
    numbers.
    Raises UserError that names the shard: unreadable, cut off, compressed, an image without a label, two images of one
    key, a class that is not among `classes`.
    """

    def __init__(self, shards: Sequence[str | Path], classes: list[str] | None = None):
        self.shards = [os.fspath(shard) for shard in shards]
        per_shard = [_scan(shard) for shard in self.shards]
        examples = [example for found in per_shard for example in found]
        if not examples:
            raise UserError(f"data: {self.shards[0]} and the other shards hold no pictures ({', '.join(SUFFIXES)})")
        self._shard_of = np.repeat(np.arange(len(self.shards)), [len(found) for found in per_shard])
        self._keys = Strings(example.key for example in examples)
        self._offsets = np.array([example.offset for example in examples], np.int64)
        self._sizes = np.array([example.size for example in examples], np.int64)
        self.classes = _classes([example.label for example in examples], self.shards) if classes is None else classes
        numbers = {name: number for number, name in enumerate(self.classes)}
        labels = []
        for i, example in enumerate(examples):
            label = example.label
            number = numbers.get(label) if isinstance(label, str) else label if label < len(self.classes) else None
            if number is None:
                raise UserError(f"data: {self.name(i)} has the class {label!r}, expected one of {len(self.classes)}")
            labels.append(number)
        self.labels = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self._keys)

    def name(self, i: int) -> str:
        return f"{self.shards[self._shard_of[i]]}:{self._keys[i]}"

    def read(self, i: int) -> Image.Image:
        # opened anew each time: no open file is shared between processes, and there may be thousands of shards
        with open(self.shards[self._shard_of[i]], "rb") as file:
            file.seek(self._offsets[i])
            content = file.read(self._sizes[i])
        return decode(io.BytesIO(content))

    def fingerprint(self) -> str:
        return fingerprint(self._keys, self.labels, self.classes)


def _scan(shard: str) -> list[_Example]:
    """The examples of one archive, in the order of their images."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, dict[str, int | str]] = {}
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # they would all be kept
                folder, base = os.path.split(member.name)
                if not member.isreg() or member.issparse() or base.startswith("."):
                    continue
                stem, _, kind = base.partition(".")
                key, kind = os.path.join(folder, stem), kind.lower()
                if f".{kind}".endswith(SUFFIXES):
                    if key in images:
                        raise UserError(f"data: {shard} holds two pictures of the key {key!r}, expected one")
                    images[key] = member.offset_data, member.size
                elif kind in LABEL_KINDS and member.size <= LABEL_BYTES:
                    file.seek(member.offset_data)
                    label = _label(kind, file.read(member.size), f"{shard}:{member.name}")
                    if label is not None:
                        labels.setdefault(key, {})[kind] = label
            # tarfile takes a broken header, and the end of the file, for the end of the archive
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"broken or cut off after {archive.offset} bytes")
    except OSError as error:
        raise UserError(f"data: cannot read shard {shard}: {error.strerror or first_line(error)}") from None
    except (tarfile.TarError, EOFError) as error:
        reason = first_line(error)
        raise UserError(f"data: shard {shard} is no whole, uncompressed tar archive: {reason}") from None
    examples = []
    for key, (offset, size) in images.items():
        kinds = labels.get(key, {})
        label = next((kinds[kind] for kind in LABEL_KINDS if kind in kinds), None)
        if label is None:
            raise UserError(f"data: {shard}:{key} has no label, expected one in {key}.cls or {key}.json")
        examples.append(_Example(key, offset, size, label))
    return examples


def _label(kind: str, content: bytes, where: str) -> int | str | None:
    """What a member says about the class; None if it is not there to say so."""
    try:
        text = content.decode().strip()
        if kind == "json":
            about = json.loads(text)
            text = about.get("label") if isinstance(about, dict) else None
            if text is None:
                return None
            if type(text) not in (int, str):
                raise ValueError(f"label is {str(text)[:40]!r}")
            str(text).encode()  # half of a surrogate pair is no text
        number = int(text) if str(text).lstrip("-").isascii() and str(text).lstrip("-").isdecimal() else None
    except (ValueError, RecursionError) as error:
        if kind == "txt":
            return None
        raise UserError(f"data: {where} holds no label, expected a number or a name: {first_line(error)}") from None
    if number is None:
        return None if kind == "txt" or not text else text
    if not 0 <= number < MOST_CLASSES:
        raise UserError(f"data: {where} holds the label {number}, expected 0 to {MOST_CLASSES - 1}")
    return number


def _classes(labels: list[int | str], shards: list[str]) -> list[str]:
    names = {label for label in labels if isinstance(label, str)}
    if not names:
        return [str(number) for number in range(max(labels) + 1)]
    if len(names) < len(set(labels)):
        raise UserError(f"data: {shards[0]} and the other shards have numbers and names as labels, expected one kind")
    return sorted(names)
