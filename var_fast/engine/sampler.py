"""Sampler: images from labels and seeds, an image independent of the batch it is made in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from var_fast.engine.edit import check_image_and_mask, kept_tokens
from var_fast.engine.graphs import Graphs
from var_fast.engine.loops import choose_loop
from var_fast.engine.native_loop import NativeLoop
from var_fast.engine.options import SamplingOptions, final_image
from var_fast.errors import UserError
from var_fast.models import VAR
from var_fast.models.var import NotFiniteLogits, check_sampling_options

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 matrix products in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for this; where the private one is gone, float32 is the safe answer
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def _whole_numbers(name: str, values: Sequence[int] | torch.Tensor) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(values)
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"they are {tensor.dtype}")
        return tensor.to(torch.int64).flatten()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{name} is {str(values)[:60]}, expected whole numbers of 64 bits: {error}") from error


class Sampler:
    """Samples a VAR with one random stream per image, keyed by (seed of the image, scale, token).

    `dtype`: "float32" (the reference's tokens; on CUDA, convolutions round to TF32 unless
    torch.backends.cudnn.allow_tf32 is False), "bfloat16" or "float16", or "auto": bfloat16 where the device computes in
    it, else float32. Float32 weights are shared with `var`; a half type keeps one copy of its own of the large ones. A
    CPU without products of a half type (of float16 any) computes in float32 and keeps the weights of the blocks'
    products in the half type.
    Weights and layers that are changed later are heard, in either case (on CUDA, and of weights mapped from a file, not
    changes through `.data` or by a fused optimizer without `var.train()` between two calls). `device`: moves the model
    there; None: where it is. `max_batch`: larger requests are made in parts. Calls from several threads are safe.

    The loop runs in C++, on CUDA as a graph that is captured at the first call with a batch size (rounded up to a power
    of two) and options. Where it cannot (a layer that was replaced, VAR_FAST_BACKEND=reference) the PyTorch
    modules run instead. Raises UserError for an unknown dtype or device.
    """

    def __init__(self, var: VAR, *, dtype: str = "auto", device: str | torch.device | None = None, max_batch: int = 64):
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}, expected at least 1")
        self.vae = var.vae_proxy[0]
        if device is not None:
            try:
                var.to(device)
                self.vae.to(device)
            except (RuntimeError, AssertionError) as error:
                raise UserError(f"device is {str(device)!r}, which cannot be used here: {error}") from error
        self.var, self.max_batch, self.device = var.eval(), max_batch, var.lvl_1L.device
        self.vae.eval()
        if dtype == "auto":
            dtype = "bfloat16" if computes_in_bfloat16(self.device) else "float32"
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}, expected auto, {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtype]
        self.graphs: Graphs | None = None
        self.loop = None
        self._choose_loop()

    def sample(
        self,
        labels: Sequence[int] | torch.Tensor,
        seeds: Sequence[int] | torch.Tensor,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        more_smooth: bool = False,
    ) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [0, 1], one for each of the B labels and seeds.

        Labels are 0 to num_classes - 1, or num_classes for the null class; `cfg` guidance at the last scale, growing
        from 0; `top_k` 0 and `top_p` 0 keep all codes; `more_smooth` mixes codes by a Gumbel softmax (for pictures,
        not for metrics). Raises UserError for arguments out of range and for logits that are not finite.
        """
        options = self._options(cfg, top_k, top_p, more_smooth)
        make = (self.graphs or self.loop).sample
        images = []
        for i, part in enumerate(self._parts(labels, seeds, options)):
            with self._counted_from(i):
                images.append(make(*part, options))
        return torch.cat(images)

    def stream(
        self,
        labels: Sequence[int] | torch.Tensor,
        seeds: Sequence[int] | torch.Tensor,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        more_smooth: bool = False,
    ) -> Iterator[torch.Tensor]:
        """As `sample`, but yields the images after each scale; the last are the finished ones."""
        options = self._options(cfg, top_k, top_p, more_smooth)
        parts = [self.loop.steps(*part, options) for part in self._parts(labels, seeds, options)]
        # One part at a time would hold back the first images, so all parts advance together.
        for _ in self.var.patch_nums:
            images = []
            for i, part in enumerate(parts):
                with self._counted_from(i):
                    images.append(next(part)())
            yield torch.cat(images)
        for part in parts:
            next(part, None)  # it gives its buffers back

    def edit(
        self,
        image: torch.Tensor,
        mask: torch.Tensor,
        labels: Sequence[int] | torch.Tensor,
        seeds: Sequence[int] | torch.Tensor,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        more_smooth: bool = False,
        *,
        paste: bool = False,
    ) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [0, 1] with new content where the mask is True: in-painting, out-painting, a
        region of another class.

        `image`: (3, H, W) or (B, 3, H, W) in [0, 1] of the model's size; `mask`: (H, W), (B, H, W) or (B, 1, H, W)
        bool; one image or mask serves all B labels and seeds. These and the options are `sample`'s; the null class,
        num_classes, asks for content of any class.

        Tokens of the kept region are the image's at every scale, the others are sampled (`sampled_tokens` has the
        rule). So outside the mask there is the tokenizer's reconstruction of the image, but for what coarse tokens and
        the decoder spread; `paste` puts the image's own pixels there. A mask that is all False gives the
        reconstruction, one that is all True gives `sample`'s images. Raises UserError for bad arguments, and for a mask
        too thin to make any token anew.
        """
        options = self._options(cfg, top_k, top_p, more_smooth)
        parts = self._parts(labels, seeds, options)
        count, patch_nums = sum(len(label_B) for label_B, _ in parts), self.var.patch_nums
        size = patch_nums[-1] * self.vae.downsample
        image_B3HW, mask_BHW = check_image_and_mask(image, mask, count, size, self.device)
        keeps = kept_tokens(self.vae, image_B3HW, mask_BHW, patch_nums, count, self.max_batch)
        edited = []
        for i, (part, keep) in enumerate(zip(parts, keeps, strict=True)):
            with self._counted_from(i):
                edited.append(final_image(self.loop.steps(*part, options, keep), len(patch_nums)))
        edited_B3HW = torch.cat(edited)
        return torch.where(mask_BHW.unsqueeze(1), edited_B3HW, image_B3HW) if paste else edited_B3HW

    def _choose_loop(self) -> None:
        """The loop for the model as it is now: a layer may have been replaced since the last call."""
        loop = choose_loop(self.var, self.dtype, last=self.loop)
        if loop is not self.loop:
            self.loop = loop
            on_gpu = self.device.type == "cuda" and isinstance(loop, NativeLoop)
            self.graphs = Graphs(loop, self.max_batch) if on_gpu else None

    def _options(self, cfg: float, top_k: int, top_p: float, more_smooth: bool) -> SamplingOptions:
        check_sampling_options(cfg, top_k, top_p)
        self._choose_loop()
        return SamplingOptions(float(cfg), min(int(top_k), self.var.V), float(top_p), bool(more_smooth))

    @contextmanager
    def _counted_from(self, part: int) -> Iterator[None]:
        """Errors within name an image by its place in the request, not in its part."""
        try:
            yield
        except NotFiniteLogits as error:
            raise NotFiniteLogits(error.scale, error.image + part * self.max_batch) from None

    def __getstate__(self):
        return {**self.__dict__, "loop": None, "graphs": None}  # packed weights and graphs are neither copied nor saved

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._choose_loop()

    def _parts(self, labels, seeds, options: SamplingOptions) -> list[tuple[torch.Tensor, torch.Tensor]]:
        label_B, seed_B = _whole_numbers("labels", labels), _whole_numbers("seeds", seeds)
        if len(label_B) != len(seed_B) or len(label_B) == 0:
            raise UserError(f"{len(label_B)} labels and {len(seed_B)} seeds, expected as many of each and at least one")
        label_B = self.var.resolve_labels(len(label_B), label_B, None)
        return list(zip(label_B.split(self.max_batch), seed_B.to(self.device).split(self.max_batch), strict=True))
