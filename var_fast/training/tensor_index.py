"""What lies where in a sharded checkpoint, as JSON: its reader unpickles nothing, and believes nothing unchecked.

torch.distributed.checkpoint describes its files in `.metadata`, a pickle, which runs what its writer pleases. So the
same description stands beside it in `tensors.json`, the only one read here. The files of values themselves are read by
torch.load(weights_only=True).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError

FILE = "tensors.json"
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")


@dataclass(frozen=True)
class _Place:
    """Where one chunk lies; the fields that FileSystemReader asks for."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


class IndexedReader(FileSystemReader):
    """Reads a checkpoint as `metadata` (of read_index) describes it."""

    def __init__(self, path: Path, metadata: Metadata):
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def describe(metadata: Metadata, results: list[list[WriteResult]]) -> dict[str, Any]:
    """The index, JSON-able, of what a save has written: `results` of every rank, `metadata` of the whole."""
    places = {written.index: written.storage_data for rank in results for written in rank}
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        chunks = []
        for chunk in entry.chunks:
            if math.prod(chunk.sizes) == 0:  # a rank that has no row of this tensor
                continue
            place = places[MetadataIndex(name, chunk.offsets)]
            chunks.append(
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": place.relative_path,
                    "start": place.offset,
                    "bytes": place.length,
                }
            )
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        tensors[name] = {"dtype": dtype, "shape": list(entry.size), "chunks": chunks}
    return tensors


def read_index(path: Path) -> Metadata:
    """The description of the checkpoint folder `path`.

    Raises UserError if it is missing or damaged, names other files than the folder's own, or has chunks that do not
    cover their tensor exactly once or reach beyond the end of their file.
    """
    try:
        tensors = json.loads((path / FILE).read_text(encoding="utf-8"))
        sizes: dict[str, int] = {}
        entries: dict[str, TensorStorageMetadata] = {}
        places: dict[MetadataIndex, _Place] = {}
        for name, entry in tensors.items():
            dtype, shape = getattr(torch, entry["dtype"]), _lengths(entry["shape"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name}: no dtype {entry['dtype']!r}")
            chunks = []
            for chunk in entry["chunks"]:
                offsets, lengths = _lengths(chunk["offsets"]), _lengths(chunk["sizes"])
                place = _Place(chunk["file"], *_lengths([chunk["start"], chunk["bytes"]]))
                if not _DATA_FILE.fullmatch(place.relative_path):
                    raise ValueError(f"{name}: {place.relative_path!r} is no name of a checkpoint's file")
                if place.relative_path not in sizes:
                    sizes[place.relative_path] = (path / place.relative_path).stat().st_size
                if place.offset + place.length > sizes[place.relative_path]:
                    raise ValueError(
                        f"{place.relative_path} is cut off: it has {sizes[place.relative_path]} bytes,"
                        f" {name} ends at {place.offset + place.length}"
                    )
                chunks.append(ChunkStorageMetadata(offsets, lengths))
                places[MetadataIndex(name, offsets)] = place
            _check_cover(name, shape, chunks)
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint: {path} is not complete: {error.filename} does not exist") from None
    except (OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint: cannot read {path}: {first_line(error)}") from None
    return Metadata(entries, storage_data=places)


def _lengths(values: list[int]) -> torch.Size:
    if not isinstance(values, list) or any(type(value) is not int or not 0 <= value < 2**63 for value in values):
        raise ValueError(f"{values!r} are no lengths")
    return torch.Size(values)


def _check_cover(name: str, shape: torch.Size, chunks: list[ChunkStorageMetadata]) -> None:
    """Raises ValueError unless the chunks tile the shape: what they left out would keep the values it had."""
    spans = []
    for chunk in chunks:
        if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape):
            raise ValueError(f"{name}: a chunk of other dimensions than the tensor's {tuple(shape)}")
        spans.append([(start, start + length) for start, length in zip(chunk.offsets, chunk.sizes)])
        if any(end > whole for (_, end), whole in zip(spans[-1], shape)):
            raise ValueError(f"{name}: a chunk reaches beyond the tensor's shape {tuple(shape)}")
    overlap = any(
        all(start < other_end and other_start < end for (start, end), (other_start, other_end) in zip(one, other))
        for one, other in itertools.combinations(spans, 2)
    )
    if overlap or sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"{name}: the chunks do not cover the tensor exactly once")
