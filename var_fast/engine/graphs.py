"""Graphs: the native loop captured in CUDA graphs, one for each (batch size, options)."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from var_fast.engine.native_loop import NativeLoop, check_not_finite
from var_fast.engine.options import SamplingOptions
from var_fast.errors import UserError

KEPT = 8  # graphs; each holds its buffers


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
        with self._lock, torch.no_grad(), torch.cuda.device(label_B.device):
            images = []
            while len(label_B):
                size = bucket(min(len(label_B), self.largest), self.largest)
                try:
                    captured = self._get(size, label_B.device, options)
                except torch.OutOfMemoryError:
                    self._make_room(size)
                    continue
                images.append(self._replay(captured, label_B[:size], seed_B[:size]))
                label_B, seed_B = label_B[size:], seed_B[size:]
            return torch.cat(images)

    def _replay(self, captured: Captured, label_B: torch.Tensor, seed_B: torch.Tensor) -> torch.Tensor:
        count = len(label_B)
        captured.label_B[:count].copy_(label_B)
        captured.label_B[count:].copy_(label_B[-1])
        captured.seed_B[:count].copy_(seed_B)
        captured.graph.replay()
        image_B3HW = captured.image_B3HW[:count].clone()
        check_not_finite(captured.run)
        return image_B3HW

    def _get(self, size: int, device: torch.device, options: SamplingOptions) -> Captured:
        model = self.loop.model()
        if model is not self._model:
            self._captured.clear()
            self._model = model
        key = (size, options)
        found = self._captured.pop(key, None) or self._capture(size, device, options)
        self._captured[key] = found  # the latest used is last
        while len(self._captured) > KEPT:
            del self._captured[next(iter(self._captured))]
        return found

    def _capture(self, size: int, device: torch.device, options: SamplingOptions) -> Captured:
        label_B = torch.zeros(size, dtype=torch.int64, device=device)
        seed_B = torch.zeros(size, dtype=torch.int64, device=device)
        with self.loop.run(size, options.cfg) as run:
            # once outside: libraries choose their algorithms and make their workspaces at a first call
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                self.loop.sample_with(run, label_B, seed_B, options)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                image_B3HW = self.loop.sample_with(run, label_B, seed_B, options)
        self.loop.forget(run)  # its buffers belong to the graph now
        return Captured(graph, label_B, seed_B, image_B3HW, run)

    def _make_room(self, size: int) -> None:
        """After an OutOfMemoryError for `size` images: first without the other graphs, then with fewer images."""
        torch.cuda.synchronize()
        others = bool(self._captured)
        self._captured.clear()
        self.loop.forget(None)
        torch.cuda.empty_cache()
        if others:
            return
        if size == 1:
            raise UserError("out of memory: not even one image fits; use a smaller model or a half dtype")
        self.largest = size // 2
