"""The attention operator of the public HMAR code, from a checkout of it: Triton, block-causal over the scales.

Nothing of it is in this repository. It needs a GPU and has not been run from here on one: what is used of it is the
module BlockSparseAttention(block_sizes, device, sparsity_pattern), called with q, k, v (B, H, L, D) and the softmax
scale. Its results are checked like any other's before they get a time.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from unittest.mock import patch

import torch

from bench.case import CannotRun, Case, Implementations
from bench.peers import base
from bench.suites.ops import as_implementation
from var_fast.errors import UserError

INTERFACE = "attn/block_sparse_attn_interface.py"
HEAD_SIZES = (16, 32, 64, 128, 256)


class Peer(base.Peer):
    path_help = f"a checkout of the public HMAR code, with {INTERFACE} in it"

    def __init__(self, path: Path):
        super().__init__(path)
        if not (path / INTERFACE).is_file():
            raise UserError(f"--peer hmar={path}: expected {self.path_help}")

    def ops(self, case: Case) -> Implementations:
        if case.subject.operator.name != "scale_attention":
            return {}
        try:
            return {"hmar": as_implementation(case, self._attention(case))}
        except CannotRun as reason:
            return {"hmar": reason}

    def _attention(self, case: Case):
        D, patch_nums = case.subject.shape["D"], case.inputs[0][0][3]
        if case.device.type != "cuda":
            raise CannotRun("the HMAR attention is written for CUDA alone")
        if case.dtype != torch.float16:
            raise CannotRun("the HMAR attention multiplies in float16 whatever its inputs are: float16 alone")
        if D not in HEAD_SIZES:
            raise CannotRun(f"the HMAR attention takes heads of {', '.join(map(str, HEAD_SIZES))} channels, not {D}")
        module = self._import().BlockSparseAttention(
            block_sizes=[pn * pn for pn in patch_nums], device=case.device, sparsity_pattern="block_causal"
        )

        def attend(q_BLHD, k_BLHD, v_BLHD, patch_nums, softmax_scale):
            # it takes any strides, so a transposed view does
            return module(*(t.transpose(1, 2) for t in (q_BLHD, k_BLHD, v_BLHD)), softmax_scale).transpose(1, 2)

        return attend

    def _import(self):
        # with this variable, when imported, it offers Triton its whole list of tile sizes to choose from
        with patch.dict(os.environ, TRITON_AUTO_TUNING="1"), base.on_path(self.path):
            try:
                return importlib.import_module("attn.block_sparse_attn_interface")
            except Exception as error:  # it runs Triton's decorators, which may raise anything
                raise CannotRun(f"the HMAR attention does not import: {type(error).__name__}: {error}") from error
