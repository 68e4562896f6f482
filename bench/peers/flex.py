"""FlexAttention with a block mask of the scales, compiled: what a user would try first for such a mask."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import torch

from bench.case import CannotRun, Case, Implementations
from bench.peers import base
from bench.peers.compile import forget_compiled
from bench.peers.sdpa import scale_of_token
from bench.suites.ops import as_implementation


class Peer(base.Peer):
    """On a GPU with mode max-autotune, but no CUDA graph: as it would run inside a model."""

    def begin(self) -> None:
        forget_compiled()

    def ops(self, case: Case) -> Implementations:
        if case.subject.operator.name != "scale_attention":
            return {}
        if problem := _problem(case):
            return {"flex": CannotRun(problem)}
        return {"flex": replace(as_implementation(case, _compiled(case)), compiles=True)}


def _problem(case: Case) -> str | None:
    if case.device.type == "cpu":
        if case.subject.backward:
            return "FlexAttention has no backward on a CPU"
        # the compiler that torch.compile would call; uncompiled, FlexAttention stores all scores
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"torch.compile needs a C++ compiler on a CPU, and {compiler} is not there"
    return None


def _compiled(case: Case):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q_BLHD, _, _, patch_nums, _ = case.inputs[0][0]
    L, device = q_BLHD.shape[1], q_BLHD.device
    scale_L = scale_of_token(patch_nums, device)

    def sees(b, h, query, key):
        return scale_L[query] >= scale_L[key]

    block_mask = create_block_mask(sees, None, None, L, L, device=device)
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=mode)

    def attend(q_BLHD, k_BLHD, v_BLHD, patch_nums, softmax_scale):
        q_BHLD, k_BHLD, v_BHLD = (t.transpose(1, 2) for t in (q_BLHD, k_BLHD, v_BLHD))
        return compiled(q_BHLD, k_BHLD, v_BHLD, block_mask=block_mask, scale=softmax_scale).transpose(1, 2)

    return attend
