"""One masked scaled_dot_product_attention over all scales: how the published code attends in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.case import Case, Implementations
from bench.peers import base
from bench.suites.ops import as_implementation


class Peer(base.Peer):
    def ops(self, case: Case) -> Implementations:
        if case.subject.operator.name != "scale_attention":
            return {}
        q_BLHD, _, _, patch_nums, _ = case.inputs[0][0]
        # added, not boolean: a boolean mask is made into this one at every call
        open_LL = scale_mask(patch_nums, q_BLHD.device)
        mask_LL = torch.zeros(open_LL.shape, dtype=case.dtype, device=q_BLHD.device).masked_fill_(~open_LL, -torch.inf)

        def attend(q_BLHD, k_BLHD, v_BLHD, patch_nums, softmax_scale):
            q_BHLD, k_BHLD, v_BHLD = (t.transpose(1, 2) for t in (q_BLHD, k_BLHD, v_BLHD))
            out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=mask_LL, scale=softmax_scale)
            return out_BHLD.transpose(1, 2)

        return {"sdpa": as_implementation(case, attend)}


def scale_mask(patch_nums: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(L, L), true where a query (row) sees a key: one of its own or an earlier scale."""
    scale_L = scale_of_token(patch_nums, device)
    return scale_L[:, None] >= scale_L


def scale_of_token(patch_nums: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(L,), the scale each token belongs to."""
    sizes = torch.tensor([pn * pn for pn in patch_nums], device=device)
    return torch.arange(len(patch_nums), device=device).repeat_interleave(sizes)
