"""NativeLoop: the sampling loop in C++ (csrc/sampling_loop.cpp), for CPU and CUDA."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.profiler import record_function

from var_fast.engine.mixed_codes import mixed_codes
from var_fast.engine.native_model import native_model, weights_version
from var_fast.engine.options import SamplingOptions, final_image
from var_fast.engine.python_loop import Keep
from var_fast.models import VAR, VQVAE, VectorQuantizer2
from var_fast.models.autoencoder import (
    AttnBlock,
    Decoder,
    Downsample2x,
    Encoder,
    Level,
    MidBlock,
    ResnetBlock,
    Upsample2x,
)
from var_fast.models.block import FFN, AdaLNBeforeHead, AdaLNSelfAttn, SelfAttention, SharedAdaLin
from var_fast.models.drop_path import DropPath
from var_fast.models.phi import Phi, PhiNonShared, PhiPartiallyShared, PhiShared
from var_fast.models.var import not_finite

Draw = Callable[[int, torch.Tensor], "tuple[torch.Tensor, torch.Tensor | None]"]
"""(scale, guided logits (B, l, V), which it may change) -> (tokens (B, l), mixed codes (B, l, Cvae) or None)."""


class NativeLoop:
    """Weights as the loop takes them, made anew when those of the model have changed, and buffers.

    Calls from several threads are safe; each has buffers of its own.
    """

    def __init__(self, var: VAR, dtype: torch.dtype):
        self.var, self.dtype = var, dtype
        self._model, self._version = None, None
        self._idle: list[tuple[tuple, object]] = []  # buffers of earlier calls, the latest last
        self._lock = threading.Lock()

    def sample(self, label_B: torch.Tensor, seed_B: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [0, 1]."""
        with self.run(len(label_B), options.cfg) as run:
            return self.sample_with(run, label_B, seed_B, options)

    def sample_with(self, run, label_B: torch.Tensor, seed_B: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
        """As `sample`, in the buffers of `run`."""
        if options.more_smooth:
            steps = self._steps(run, label_B, options.cfg, self._draw(run, seed_B, options))
            return final_image(steps, len(self.var.patch_nums))
        with named_errors():
            return run.sample(label_B, seed_B, *options[:3], stream(label_B.device))

    def steps(
        self, label_B: torch.Tensor, seed_B: torch.Tensor, options: SamplingOptions, keep: Keep | None = None
    ) -> Iterator[Callable[[], torch.Tensor]]:
        """After each scale a function that decodes the images as they stand, good until the next step."""
        with self.run(len(label_B), options.cfg) as run:
            for image in self._steps(run, label_B, options.cfg, self._draw(run, seed_B, options, keep)):
                check_not_finite(run)
                yield image

    def sample_drawn_by(self, label_B: torch.Tensor, cfg: float, draw: Draw) -> torch.Tensor:
        """As `sample`, but `draw` picks the tokens."""
        with self.run(len(label_B), cfg) as run:
            return final_image(self._steps(run, label_B, cfg, draw), len(self.var.patch_nums))

    def _steps(self, run, label_B: torch.Tensor, cfg: float, draw: Draw) -> Iterator[Callable[[], torch.Tensor]]:
        run.begin(label_B, cfg, stream(label_B.device))
        for si, pn in enumerate(self.var.patch_nums):
            with torch.no_grad(), named_errors(), record_function(f"scale:{si}:{pn}"):
                idx_Bl, codes_BlC = draw(si, run.logits())
                run.advance(idx_Bl if codes_BlC is None else None, codes_BlC)
            yield run.image

    def _draw(self, run, seed_B: torch.Tensor, options: SamplingOptions, keep: Keep | None = None) -> Draw:
        scales = len(self.var.patch_nums)
        codebook_VC = self.var.vae_quant_proxy[0].embedding.weight.detach()

        def draw(si, logits_BlV):
            idx_Bl, codes_BlC = run.draw(logits_BlV, seed_B, options.top_k, options.top_p), None
            if options.more_smooth:
                codes_BlC = mixed_codes(logits_BlV, seed_B, si, scales, options.top_k, options.top_p, codebook_VC)
            return keep(si, idx_Bl, codes_BlC) if keep else (idx_Bl, codes_BlC)

        return draw

    @contextmanager
    def run(self, batch: int, cfg: float) -> Iterator:
        """A `_C.SamplingRun` of this batch size for one thread, with the model's weights as they are now."""
        from var_fast import _C

        key = (batch, cfg != 0 and len(self.var.patch_nums) > 1)
        with self._lock:
            model = self.model()
            found = next((i for i, (own, _) in enumerate(self._idle) if own == (key, id(model))), None)
            run = None if found is None else self._idle.pop(found)[1]
        if run is None:
            run = _C.SamplingRun(model, *key)
        yield run  # buffers of a call that failed are not kept
        with self._lock:
            if self._model is model:
                self._idle = [*self._idle[-1:], ((key, id(model)), run)]

    def forget(self, run) -> None:
        """Drops the buffers of an idle run, or of all of them with None."""
        with self._lock:
            self._idle = [] if run is None else [(key, idle) for key, idle in self._idle if idle is not run]

    def model(self):
        """The weights as they are now."""
        version = weights_version(self.var)
        if version != self._version:
            self._idle.clear()
            self._model = None  # before the new one is made: there may be no room for two
            self._model, self._version = native_model(self.var, self.dtype), version
        return self._model


def stream(device: torch.device) -> int:
    """The CUDA stream that torch computes on now; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@contextmanager
def named_errors() -> Iterator[None]:
    """Turns the loop's errors into the ones users know."""
    from var_fast import _C

    try:
        yield
    except _C.NotFinite as error:
        raise not_finite(*error.args) from None


KNOWN = {
    *(nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding),
    *(nn.SiLU, nn.Identity, nn.Dropout, nn.Sequential, nn.ModuleList),
    *(VAR, AdaLNSelfAttn, SelfAttention, FFN, AdaLNBeforeHead, SharedAdaLin, DropPath),
    *(VQVAE, VectorQuantizer2, Phi, PhiShared, PhiPartiallyShared, PhiNonShared),
    *(Encoder, Decoder, ResnetBlock, AttnBlock, Upsample2x, Downsample2x, MidBlock, Level),
}

METHODS = {"forward", "forward_modulated"}  # what the modules call of each other


def why_not_native(var: VAR, dtype: torch.dtype) -> str | None:
    """Why the native loop cannot stand for this model, or None if it can.

    It reads the weights of the layers it knows: one that was replaced or hooked into (adapters, quantised layers,
    probes) would not be heard.
    """
    device = var.lvl_1L.device
    if device.type == "cpu" and dtype == torch.float16:
        return "float16 is not for CPUs"
    for model in (var, var.vae_proxy[0]):
        for name, module in model.named_modules():
            if type(module) not in KNOWN:
                return f"{name or 'the model'} is a {type(module).__name__}, a class that the native loop does not know"
            if module._forward_hooks or module._forward_pre_hooks or not METHODS.isdisjoint(vars(module)):
                return f"{name or 'the model'} has a forward of its own or a hook"
        for name, weight in model.named_parameters():
            if weight.dtype != torch.float32 or weight.device != device:
                return f"{name} is {weight.dtype} on {weight.device}, expected torch.float32 on {device}"
    return None


def check_not_finite(run) -> None:
    """Raises UserError if a GPU met logits that were not finite (a CPU has said so itself); waits for it."""
    if run.not_finite.any():
        raise not_finite(*(int(n) for n in run.not_finite.nonzero()[0]))
