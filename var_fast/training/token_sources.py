"""Where the transformer's trainer has its tokens from: a token cache, or images and the tokenizer's encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from var_fast.errors import UserError
from var_fast.models import VQVAE
from var_fast.training.data import Augmentation, ImageSource, TrainBatches, evaluation_batches, to_float
from var_fast.training.ranks import Ranks
from var_fast.training.token_cache import CacheBatches, TokenCache
from var_fast.training.transfer import to_device


@dataclass(frozen=True)
class TokenBatch:
    """This rank's examples of one pass: labels, and tokens or the images they are made from."""

    label_B: torch.Tensor  # (B,) int64
    tokens_BL: torch.Tensor | None = None  # (B, L) int64
    images_u8: torch.Tensor | None = None  # (B, 3, S, S)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What there is, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class TokenSource(Protocol):
    """Training and held-out tokens."""

    classes: list[str]
    images: int  # that make an epoch
    skipped: set[str]  # names of pictures that could not be read

    def batches(self, first_step: int, ranks: Ranks, batch: int, passes: int, seed: int) -> Iterator[list[TokenBatch]]:
        """This rank's passes of every step from `first_step` on."""

    def tokens_of(self, batch: TokenBatch, vae: VQVAE) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens (B, L) int64, labels (B,)) on the tokenizer's device."""

    def facts(self) -> dict[str, Any]:
        """What a resumed run must find again, in JSON's types."""

    def held_out(self, vae: VQVAE, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(tokens (M, L), labels (M,)) on the CPU, the same on every rank; None where nothing is held out."""


class CachedTokens:
    """The token cache's: the encoder has nothing to do."""

    def __init__(self, cache: TokenCache, held_out_images: int | None = None) -> None:
        """held_out_images: at most so many of the validation images are evaluated on."""
        self.train, self.val = cache.split("train"), cache.split("val")
        self.classes, self.skipped, self.images = cache.classes, set(), len(self.train)
        self._limit, self._fingerprint = held_out_images, cache.fingerprint()

    def batches(self, first_step: int, ranks: Ranks, batch: int, passes: int, seed: int) -> Iterator[list[TokenBatch]]:
        parts = CacheBatches(self.train, batch=batch, seed=seed, ranks=ranks, first_step=first_step, parts=passes)
        while True:
            made = [next(parts) for _ in range(passes)]
            yield [TokenBatch(label_B, tokens_BL) for tokens_BL, label_B in made]

    def tokens_of(self, batch: TokenBatch, vae: VQVAE) -> tuple[torch.Tensor, torch.Tensor]:
        device = vae.quantize.embedding.weight.device
        return to_device(batch.tokens_BL, device), to_device(batch.label_B, device)

    def facts(self) -> dict[str, Any]:
        return {"tokens": self._fingerprint, "images": self.images, "views": self.train.views}

    def held_out(self, vae: VQVAE, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.val is None or not len(self.val):
            return None
        count = min(len(self.val), self._limit or len(self.val))
        rows = [i * len(self.val) // count for i in range(count)]  # of all classes, which follow each other
        return self.val.tokens(rows, [0] * count), self.val.labels[rows]


class EncodedImages:
    """Those that the tokenizer's encoder makes of every batch of images."""

    def __init__(
        self,
        train: ImageSource,
        val: ImageSource | None,
        augmentation: Augmentation,
        *,
        workers: int = 0,
        held_out_images: int | None = None,
    ) -> None:
        """held_out_images: at most so many of the validation images are evaluated on."""
        self.train, self.val, self.augmentation, self.workers = train, val, augmentation, workers
        self.classes, self.skipped, self.images = train.classes, set(), len(train)
        self._limit, self._held_out = held_out_images, None

    def batches(self, first_step: int, ranks: Ranks, batch: int, passes: int, seed: int) -> Iterator[list[TokenBatch]]:
        parts = TrainBatches(
            self.train,
            self.augmentation,
            batch=batch,
            seed=seed,
            ranks=ranks,
            first_step=first_step,
            parts=passes,
            workers=self.workers,
        )
        while True:
            made = [next(parts) for _ in range(passes)]
            self.skipped.update(name for one in made for name in one.skipped)
            yield [TokenBatch(one.labels, images_u8=one.images_u8) for one in made]

    def tokens_of(self, batch: TokenBatch, vae: VQVAE) -> tuple[torch.Tensor, torch.Tensor]:
        device = vae.quantize.embedding.weight.device
        img_B3HW = to_float(to_device(batch.images_u8, device))
        return torch.cat(vae.img_to_idxBl(img_B3HW), dim=1), to_device(batch.label_B, device)

    def facts(self) -> dict[str, Any]:
        a = self.augmentation
        return {"images": self.train.fingerprint(), "enlarge": a.enlarge, "flip": a.flip}

    def held_out(self, vae: VQVAE, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Encoded at the first call, each rank its share, and kept."""
        if self.val is None or not len(self.val):
            return None
        if self._held_out is None:
            with ranks.together():
                pieces = self._encode_held_out(vae, ranks)
            shares = [piece for share in ranks.gather(pieces) for piece in share]
            if not shares:
                raise UserError(f"data: none of the {len(self.val)} validation images can be read")
            tokens_ML, label_M = (torch.cat([torch.from_numpy(piece[i]) for piece in shares]) for i in (0, 1))
            self._held_out = tokens_ML, label_M.long()
        return self._held_out

    def _encode_held_out(self, vae: VQVAE, ranks: Ranks) -> list[list[np.ndarray]]:
        """[tokens, labels] of each batch of this rank's share."""
        pieces = []
        where = dict(rank=ranks.rank, ranks=ranks.count, limit=self._limit, workers=self.workers)
        for batch in evaluation_batches(self.val, self.augmentation, batch=64, **where):
            self.skipped.update(batch.skipped)
            one = TokenBatch(batch.labels, images_u8=batch.images_u8)
            pieces.append([t.to("cpu", torch.int32).numpy() for t in self.tokens_of(one, vae)])
        return pieces
