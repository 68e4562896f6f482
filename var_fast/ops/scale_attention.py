"""scale_attention: a token of scale k sees all tokens of scales <= k (block-causal mask; VAR section 3.1, eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend


def scale_attention_reference(q_BLHD, k_BLHD, v_BLHD, patch_nums, softmax_scale):
    # One dense attention per scale over the prefix it may see: the same numbers as one masked attention over all
    # scales, without the masked third of the work.
    q_BHLD, k_BHLD, v_BHLD = (t.transpose(1, 2) for t in (q_BLHD, k_BLHD, v_BLHD))
    outs, begin = [], 0
    for pn in patch_nums:
        if begin == q_BHLD.shape[2]:
            break
        end = begin + pn * pn
        outs.append(
            F.scaled_dot_product_attention(
                q_BHLD[:, :, begin:end], k_BHLD[:, :, :end], v_BHLD[:, :, :end], scale=softmax_scale
            )
        )
        begin = end
    return torch.cat(outs, dim=2).transpose(1, 2)


def scale_attention(
    q_BLHD: torch.Tensor,
    k_BLHD: torch.Tensor,
    v_BLHD: torch.Tensor,
    patch_nums: Sequence[int],
    softmax_scale: float,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(softmax_scale q k^T + mask) v, the mask open from a token to its own and all earlier scales.

    Shapes: q, k, v, result (B, L, H, D); L = sum(pn * pn) of `patch_nums` or of a prefix (progressive training).
    Raises ValueError where L ends inside a scale, BackendUnavailable where a named backend cannot run.
    """
    L, ends = q_BLHD.shape[1], [0]
    for pn in patch_nums:
        ends.append(ends[-1] + pn * pn)
    if L == 0 or L not in ends:
        raise ValueError(f"q_BLHD has L = {L} tokens, expected a prefix of the scales {tuple(patch_nums)}: {ends[1:]}")
    if not q_BLHD.shape == k_BLHD.shape == v_BLHD.shape:
        raise ValueError(
            f"q, k, v have shapes {tuple(q_BLHD.shape)}, {tuple(k_BLHD.shape)}, {tuple(v_BLHD.shape)}: "
            "expected the same"
        )
    choose_backend("scale_attention", q_BLHD.device, backend)
    return scale_attention_reference(q_BLHD, k_BLHD, v_BLHD, patch_nums, softmax_scale)
