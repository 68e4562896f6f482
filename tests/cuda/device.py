"""The built CUDA operators (var_fast._C) on the current device, for tests."""

from __future__ import annotations

import torch

from tests.cuda.operators import Operators


class DeviceOperators(Operators):
    def call(self, name, *arguments):
        self._function(name)(*map(self._argument, arguments), torch.cuda.current_stream().cuda_stream)

    def size(self, name, *arguments):
        return self._function(name)(*arguments)

    def place(self, tensor):
        return tensor.cuda().contiguous()

    @staticmethod
    def _function(name):
        from var_fast import _C

        return getattr(_C, f"cuda_{name}")

    @staticmethod
    def _argument(value):
        if isinstance(value, torch.Tensor):
            return value.data_ptr()
        return 0 if value is None else value
