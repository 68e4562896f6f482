"""NativeLoop: the sampling loop in C++ (csrc/sampling_loop.cpp), for CPU and CUDA."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.profiler import record_function

from var_fast.engine.mixed_codes import mixed_codes
from var_fast.engine.model_watch import ModelWatch
from var_fast.engine.native_model import native_model
from var_fast.engine.options import SamplingOptions, final_image
from var_fast.engine.python_loop import Keep
from var_fast.models import VAR
from var_fast.models.var import NotFiniteLogits

Draw = Callable[[int, torch.Tensor], "tuple[torch.Tensor, torch.Tensor | None]"]
"""(scale, guided logits (B, l, V), which it may change) -> (tokens (B, l), mixed codes (B, l, Cvae) or None)."""


class NativeLoop:
    """Weights as the loop takes them, made anew when those of the model have changed, and buffers.

    Calls from several threads are safe; each has buffers of its own.
    """

    def __init__(self, var: VAR, dtype: torch.dtype):
        # weak: a VAR keeps its loop, and would otherwise keep itself alive
        self._var, self.dtype = weakref.ref(var), dtype
        self._watch = ModelWatch(var)
        self._model, self._weights = None, None
        self._idle: tuple[tuple, object] | None = None  # the buffers of the last call
        self._lock = threading.RLock()

    @property
    def var(self) -> VAR:
        return self._var()

    def still_stands(self) -> bool:
        """Whether the model's layers are those that `why_not_native` has looked at."""
        return self._watch.same_layers()

    def sample(self, label_B: torch.Tensor, seed_B: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [0, 1]."""
        with self.run(len(label_B), options.cfg) as run:
            images_B3HW = self.sample_with(run, label_B, seed_B, options)
            check_not_finite(run)
            return images_B3HW

    def sample_with(self, run, label_B: torch.Tensor, seed_B: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
        """As `sample`, in the buffers of `run`."""
        if options.more_smooth:
            steps = self._steps(run, label_B, options.cfg, self._draw(run, seed_B, options))
            return final_image(steps, len(self.var.patch_nums))
        with named_errors(), on_device(label_B.device):
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
        device = label_B.device

        def image() -> torch.Tensor:
            with on_device(device):
                run.use_stream(stream(device))
                return run.image()

        with on_device(device):
            run.begin(label_B, cfg, stream(device))
        for si, pn in enumerate(self.var.patch_nums):
            with torch.no_grad(), plain(device), named_errors(), record_function(f"scale:{si}:{pn}"):
                run.use_stream(stream(device))
                idx_Bl, codes_BlC = draw(si, run.logits())
                run.advance(idx_Bl if codes_BlC is None else None, codes_BlC)
            yield image

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
        with self._lock:
            model = self.model()
            key = (id(model), batch, self.guided(cfg))
            run = None
            if self._idle is not None:
                (own, idle), self._idle = self._idle, None  # others are let go before new ones are made
                run = idle if own == key else None
                del idle
        run = run or self.new_run(batch, cfg)
        yield run  # buffers of a call that failed are not kept
        with self._lock:
            if self._model is model:
                self._idle = (key, run)

    def new_run(self, batch: int, cfg: float):
        """As `run`, but nobody else's ever."""
        from var_fast import _C

        with plain(self.var.lvl_1L.device), torch.no_grad():
            return _C.SamplingRun(self.model(), batch, self.guided(cfg))

    def guided(self, cfg: float) -> bool:
        return cfg != 0 and len(self.var.patch_nums) > 1

    def model(self):
        """The weights as they are now."""
        with self._lock:
            weights = self._watch.weights()
            if self._model is None or weights != self._weights:
                self.forget()  # before the new one is made: there may be no room for two
                with plain(self.var.lvl_1L.device):
                    self._model = native_model(self.var, self.dtype)
                self._weights = weights
            return self._model

    def is_current(self, model) -> bool:
        """Whether `model` is what `model()` would give without work."""
        return model is self._model and self._watch.weights() == self._weights

    def forget(self) -> None:
        """Lets go of the packed weights and the idle buffers."""
        with self._lock:
            self._model = self._weights = self._idle = None


@contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """The device chosen, whatever the caller has set of autocast and inference mode set aside."""
    with on_device(device), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def on_device(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
        raise NotFiniteLogits(*error.args) from None


def check_not_finite(run, count: int | None = None) -> None:
    """Raises NotFiniteLogits if a GPU met some in the first `count` images (a CPU has said so itself); waits for it."""
    flags_SB = run.not_finite[:, :count]
    if flags_SB.any():
        raise NotFiniteLogits(*(int(n) for n in flags_SB.nonzero()[0]))
