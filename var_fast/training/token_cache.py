"""Every image's tokens, in files: read where training skips the encoder. write_token_cache.py makes them.

The folder holds

- index.json: what was made, with which settings, and for each shard its number of images and its checksums;
- train-00000.tokens.npy, (images, views, L) uint16 (uint32 with more than 65536 codes), and train-00000.labels.npy,
  (images,) int32, and so on: numpy's own format, in the order of the images;
- the same of val, if there are such images;
- tokenizer/: the tokenizer, in float32.

View 0 of an image is its centre; then come random windows, and then, with flips, all of these mirrored. Images of val
have the first view only. L tokens are those of all scales, the coarsest first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from var_fast.checkpoint import load_checkpoint
from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError
from var_fast.layout import check_keywords
from var_fast.models import VQVAE
from var_fast.training.files import weights_hash
from var_fast.training.order import batch_positions, check_batch, examples_at, position_seed
from var_fast.training.ranks import Ranks

KIND, VERSION = "var_fast token cache", 1
INDEX, SETTINGS, TOKENIZER = "index.json", "settings.json", "tokenizer"
SPLITS = ("train", "val")
LABELS = np.dtype("<i4")


class TokenCache:
    """An open cache. `size`, in pixels, is that of the images; `views` those of a training image."""

    def __init__(self, path: Path, index: dict[str, Any], splits: dict[str, TokenSplit]):
        self.path, self._index = path, index
        self.tokenizer_hash: str = index["tokenizer_hash"]  # as files.weights_hash, in float32
        self.patch_nums: tuple[int, ...] = tuple(index["patch_nums"])
        self.vocab_size: int = index["vocab_size"]
        self.classes: list[str] = index["classes"]
        self.size: int = index["size"]
        self.views = splits["train"].views
        self._splits = splits

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> TokenCache:
        """Opens the cache in the folder `path`. verify False: contents are not compared with their checksums.

        Raises UserError that names the file: no cache, one that was not finished, and whatever is missing, cut off,
        changed or out of range.
        """
        path = Path(path)
        index = _read_index(path)
        splits = {name: TokenSplit(path, name, index, verify) for name in SPLITS if name in index["splits"]}
        cache = cls(path, index, splits)
        if verify:
            found = weights_hash(cache.tokenizer())
            if found != cache.tokenizer_hash:
                raise UserError(
                    f"{path / TOKENIZER} is another tokenizer ({found[:12]}) than made the tokens "
                    f"({cache.tokenizer_hash[:12]}): expected it unchanged"
                )
        return cache

    def tokenizer(self) -> VQVAE:
        """The tokenizer that made the tokens, in float32 on the CPU."""
        vae = load_checkpoint(self.path / TOKENIZER).vae
        found = (vae.vocab_size, vae.quantize.v_patch_nums, vae.quantize.v_patch_nums[-1] * vae.downsample)
        if found != (self.vocab_size, self.patch_nums, self.size):
            raise UserError(f"{self.path / TOKENIZER} has (codes, scales, size) {found}, expected those of {INDEX}")
        return vae

    def fingerprint(self) -> str:
        """Known by it: a hash of the checksums of all training shards."""
        shards = [shard["tokens_sha256"] + shard["labels_sha256"] for shard in self._index["splits"]["train"]["shards"]]
        return hashlib.sha256("".join(shards).encode()).hexdigest()

    def check_tokenizer(self, vae: VQVAE) -> None:
        """Raises UserError if `vae` is not the tokenizer (in float32) that made the tokens."""
        found = weights_hash(vae)
        if found != self.tokenizer_hash:
            raise UserError(
                f"data: {self.path} was made by another tokenizer ({self.tokenizer_hash[:12]}) than the one "
                f"given ({found[:12]}): expected one tokenizer, make the cache anew with it"
            )

    def split(self, name: str) -> TokenSplit | None:
        """The images of "train" or "val"; None if there are none of val."""
        return self._splits.get(name)


class TokenSplit:
    """N images, each with the tokens of `views` views. The tokens stay in their files until they are asked for."""

    def __init__(self, path: Path, name: str, index: dict[str, Any], verify: bool):
        self.views = views_of(name, index["crops"], index["flips"])
        self._vocab_size = index["vocab_size"]
        length = sum(pn * pn for pn in index["patch_nums"])
        self._paths: list[Path] = []
        self._shards: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for number, shard in enumerate(index["splits"][name]["shards"]):
            tokens_path, labels_path = shard_paths(path, name, number)
            shape = (shard["images"], self.views, length)
            if verify:
                _check_hash(tokens_path, shard["tokens_sha256"])
                _check_hash(labels_path, shard["labels_sha256"])
            self._paths.append(tokens_path)
            self._shards.append(_open_array(tokens_path, token_dtype(self._vocab_size), shape))
            labels.append(_open_array(labels_path, LABELS, shape[:1]))
            if not ((labels[-1] >= 0) & (labels[-1] < len(index["classes"]))).all():
                raise UserError(f"{labels_path} has labels out of range, expected 0 to {len(index['classes']) - 1}")
            if verify:
                self._check_tokens(self._shards[-1], number)
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.labels = torch.from_numpy(np.concatenate(labels).astype(np.int64))  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def tokens(self, images: Sequence[int], views: Sequence[int]) -> torch.Tensor:
        """(B, L) int64: the tokens of B images, each of one of its views."""
        image_B, view_B = np.asarray(images, np.int64), np.asarray(views, np.int64)
        if len(image_B) and not 0 <= image_B.min() <= image_B.max() < len(self):
            raise IndexError(f"images: got {image_B.min()} to {image_B.max()}, expected 0 to {len(self) - 1}")
        shard_B = np.searchsorted(self._ends, image_B, side="right")
        tokens_BL = np.empty((len(image_B), self._shards[0].shape[2]), np.int64)
        for number in np.unique(shard_B):
            shard = self._shards[number]
            here = shard_B == number
            tokens_BL[here] = shard[image_B[here] - (self._ends[number] - len(shard)), view_B[here]]
            self._check_tokens(tokens_BL[here], number)
        return torch.from_numpy(tokens_BL)

    def _check_tokens(self, tokens: np.ndarray, number: int) -> None:
        if tokens.size and int(tokens.max()) >= self._vocab_size:
            raise UserError(f"{self._paths[number]} has tokens out of range, expected 0 to {self._vocab_size - 1}")


class CacheBatches:
    """Endless iterator of this rank's (tokens (B, L) int64, labels (B,) int64) from step number `first_step` on.

    As TrainBatches of images: `batch` is of all ranks together, `parts` batches make a step, and the order and the view
    taken of each image are functions of the seed and the position. Raises UserError if `batch` cannot be divided.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        batch: int,
        seed: int,
        ranks: Ranks | None = None,
        first_step: int = 0,
        parts: int = 1,
    ):
        self._split, self._batch, self._seed, self._parts = split, batch, seed, parts
        self._ranks = Ranks() if ranks is None else ranks
        check_batch(batch, self._ranks, parts)
        self._next = first_step * parts

    def __iter__(self) -> CacheBatches:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        step, part = divmod(self._next, self._parts)
        where = dict(rank=self._ranks.rank, ranks=self._ranks.count, part=part, parts=self._parts)
        positions = batch_positions(step, self._batch, **where)
        images = examples_at(positions, len(self._split), self._seed)
        views = [position_seed(self._seed, position) % self._split.views for position in positions]
        self._next += 1
        return self._split.tokens(images, views), self._split.labels[images]


def views_of(split: str, crops: int, flips: bool) -> int:
    """How many views an image of this split has."""
    return crops * (2 if flips else 1) if split == "train" else 1


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that tokens are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_paths(path: Path, split: str, number: int) -> tuple[Path, Path]:
    """The files of a shard's tokens and of its labels."""
    return path / f"{split}-{number:05}.tokens.npy", path / f"{split}-{number:05}.labels.npy"


def is_token_cache(path: str | Path) -> bool:
    """Whether a token cache lies in this folder, finished or not."""
    for name in (INDEX, SETTINGS):
        try:
            about = json.loads(Path(path, name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(about, dict) and about.get("kind") == KIND:
            return True
    return False


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_hash(path: Path, expected: str) -> None:
    try:
        found = file_hash(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if found != expected:
        raise UserError(f"{path} is damaged: its checksum is {found[:12]}, expected {expected[:12]}")


def _open_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A mapped array, found to be of this type and shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises whatever the damaged bytes lead to
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or first_line(error)}") from None
    if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (dtype, shape):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{path} holds {found}, expected {dtype} {shape}")
    return array


def _read_index(path: Path) -> dict[str, Any]:
    """index.json, with all its entries of the right types."""
    file = path / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if is_token_cache(path):
            raise UserError(
                f"data: the token cache {path} is not finished: run the same `var-fast tokenize` again, it goes on "
                "where it stopped"
            ) from None
        raise UserError(f"data: {path} holds no token cache, expected a folder that `var-fast tokenize` made") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"data: cannot read {file}: {first_line(error)}") from None
    if not isinstance(index, dict) or index.get("kind") != KIND:
        raise UserError(f"data: {file} is no index of a token cache")
    if index.get("version") != VERSION:
        raise UserError(f"data: {file} is of version {str(index.get('version'))[:20]}, expected {VERSION}")
    for name, (expected, holds) in _RULES.items():
        if not holds(index.get(name)):
            raise UserError(f"data: {file}: {name} is {str(index.get(name))[:60]!r}, expected {expected}")
    for name in ("vocab_size", "patch_nums"):
        if name not in index:
            raise UserError(f"data: {file} has no {name}")
    check_keywords("tokenizer", {"vocab_size": index["vocab_size"], "v_patch_nums": index["patch_nums"]}, str(file))
    return index


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1 << 20


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def _is_shard(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("images")) is int
        and 0 <= value["images"] <= 1 << 32
        and _is_hash(value.get("tokens_sha256"))
        and _is_hash(value.get("labels_sha256"))
    )


def _is_split(value: Any) -> bool:
    shards = value.get("shards") if isinstance(value, dict) else None
    return isinstance(shards, list) and all(map(_is_shard, shards)) and sum(shard["images"] for shard in shards) > 0


def _are_splits(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and "train" in value
        and set(value) <= set(SPLITS)
        and all(map(_is_split, value.values()))
    )


_RULES = {
    "tokenizer_hash": ("a SHA-256", _is_hash),
    "size": ("a whole number", _is_count),
    "crops": ("a whole number", _is_count),
    "flips": ("true or false", lambda v: type(v) is bool),
    "classes": ("names", lambda v: isinstance(v, list) and v and all(isinstance(name, str) for name in v)),
    "splits": ("shards of train, and perhaps val, with images and checksums", _are_splits),
}
