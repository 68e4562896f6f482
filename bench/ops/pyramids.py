"""Pyramids of token maps by their number of tokens, so that a shape says L alone."""

from __future__ import annotations

from var_fast.layout import PUBLISHED_PATCH_NUMS

TINY = (1, 2, 3, 4)

PATCH_NUMS = {sum(pn * pn for pn in patch_nums): patch_nums for patch_nums in (TINY, *PUBLISHED_PATCH_NUMS.values())}
"""680, 2240 and 9451 tokens are the published pyramids of 256, 512 and 1024 px; 30 are for small shapes."""


def allowed_pairs(L: int) -> int:
    """Pairs (query, key) that the mask of scales allows: a token sees its own and all earlier scales."""
    pairs = end = 0
    for pn in PATCH_NUMS[L]:
        end += pn * pn
        pairs += pn * pn * end
    return pairs
