"""Graphs: the native loop captured in CUDA graphs, one for each (batch size, options)."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from var_fast.engine.native_loop import NativeLoop, check_not_finite, on_device, plain
from var_fast.engine.options import SamplingOptions
from var_fast.errors import UserError

KEPT = 8  # graphs; each holds its buffers
_CAPTURING = threading.Lock()  # one capture at a time in the whole process


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    label_B: torch.Tensor
    seed_B: torch.Tensor
    image_B3HW: torch.Tensor
    run: object


def bucket(batch: int, largest: int) -> int:
    """The batch size to capture for `batch` images: the next power of two, at most `largest`."""
    return min(1 << (batch - 1).bit_length(), largest)


class Graphs:
    """As NativeLoop.sample, replaying graphs. A request is padded to its bucket; where the memory does not suffice for
    one, it is made in smaller parts from then on. Calls from several threads wait for each other."""

    def __init__(self, loop: NativeLoop, max_batch: int):
        self.loop, self.largest = loop, max_batch
        self._captured: dict[tuple, Captured] = {}
        self._model = None
        self._lock = threading.Lock()

    def sample(self, label_B: torch.Tensor, seed_B: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [0, 1]."""
        with self._lock, torch.no_grad(), on_device(label_B.device):
            images: list[torch.Tensor] = []
            done = 0
            while done < len(label_B):
                size = bucket(min(len(label_B) - done, self.largest), self.largest)
                captured = self._try(size, label_B.device, options)
                if captured is None:  # here, where the error and what its frames hold are gone
                    self._make_room(size)
                    continue
                part = slice(done, done + size)
                images.append(self._replay(captured, label_B[part], seed_B[part]))
                done += size
            return torch.cat(images)

    def _replay(self, captured: Captured, label_B: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
        count = len(label_B)
        captured.label_B[:count].copy_(label_B)
        captured.label_B[count:].copy_(label_B[-1])
        captured.seed_B[:count].copy_(seed_B)
        captured.graph.replay()
        image_B3HW = captured.image_B3HW[:count].clone()
        check_not_finite(captured.run, count)
        return image_B3HW

    def _try(self, size: int, device: torch.device, options: SamplingOptions) -> Captured | None:
        """The graph for `size` images, or None where the memory does not suffice."""
        try:
            if self._model is not None and not self.loop.is_current(self._model):
                self._let_go()
            self._model = self.loop.model()
            key = (size, options)
            found = self._captured.pop(key, None) or self._capture(size, device, options)
        except torch.OutOfMemoryError:
            return None
        self._captured[key] = found  # the latest used is last
        while len(self._captured) > KEPT:
            del self._captured[next(iter(self._captured))]
        return found

    def _capture(self, size: int, device: torch.device, options: SamplingOptions) -> Captured:
        with _CAPTURING, plain(device):
            label_B = torch.zeros(size, dtype=torch.int64, device=device)
            seed_B = torch.zeros(size, dtype=torch.int64, device=device)
            run = self.loop.new_run(size, options.cfg)
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                # once outside: libraries choose their algorithms and make their workspaces at a first call
                self.loop.sample_with(run, label_B, seed_B, options)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do meanwhile is no part of this graph, and does not spoil it
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                image_B3HW = self.loop.sample_with(run, label_B, seed_B, options)
            torch.cuda.current_stream(device).wait_stream(stream)
        return Captured(graph, label_B, seed_B, image_B3HW, run)

    def _let_go(self) -> None:
        torch.cuda.synchronize()
        self._captured.clear()
        self._model = None

    def _make_room(self, size: int) -> None:
        """After an OutOfMemoryError for `size` images: first without the other graphs, then with fewer images."""
        others = bool(self._captured)
        self._let_go()
        self.loop.forget()
        torch.cuda.empty_cache()
        if others:
            return
        if size == 1:
            raise UserError("out of memory: not even one image fits; use a smaller model or a half dtype")
        self.largest = size // 2
