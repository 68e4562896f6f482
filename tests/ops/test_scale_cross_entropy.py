"""scale_cross_entropy against log-softmax written out; per-scale parts against means over their tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.ops import scale_cross_entropy

PATCH_NUMS = (1, 2, 3)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.sampled_from([1, 5, 14]), st.floats(0, 0.5), st.booleans(), st.integers(0, 2**16))
def test_formula(B, L, smoothing, weighted, seed):
    g = torch.Generator().manual_seed(seed)
    C, V = 6, 7
    h, weight = torch.randn(B, L, C, generator=g).double(), torch.randn(V, C, generator=g).double()
    bias, target = torch.randn(V, generator=g).double(), torch.randint(V, (B, L), generator=g)
    token_weight = torch.rand(B, L, generator=g).double() if weighted else None
    loss, loss_S, accuracy_S = scale_cross_entropy(h, weight, bias, target, token_weight, smoothing, PATCH_NUMS)
    log_p = (h @ weight.T + bias).log_softmax(-1)
    ce = -(1 - smoothing) * log_p.gather(-1, target[..., None]).squeeze(-1) - smoothing * log_p.mean(-1)
    torch.testing.assert_close(loss, (ce * (token_weight if weighted else 1 / L)).sum(1).mean())
    ends = [1, 5, 14]
    for si, end in enumerate(ends[: ends.index(L) + 1]):
        part = slice(ends[si - 1] if si else 0, end)
        torch.testing.assert_close(loss_S[si], ce[:, part].mean())
        hits = log_p[:, part].argmax(-1) == target[:, part]
        torch.testing.assert_close(accuracy_S[si], hits.double().mean())
    assert len(loss_S) == len(accuracy_S) == ends.index(L) + 1


def test_gradients_reach_features_and_head_only_through_the_loss():
    h = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(4, (2, 5))
    assert torch.autograd.gradcheck(lambda *a: scale_cross_entropy(*a, target, None, 0.1)[0], (h, weight, bias))
    _, loss_S, accuracy_S = scale_cross_entropy(h, weight, bias, target, patch_nums=(1, 2))
    assert not loss_S.requires_grad and not accuracy_S.requires_grad


def test_wrong_shapes_are_named():
    h, weight = torch.zeros(1, 4, 3), torch.zeros(5, 3)
    with pytest.raises(ValueError, match="target_BL"):
        scale_cross_entropy(h, weight, None, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="L = 4 tokens"):
        scale_cross_entropy(h, weight, None, torch.zeros(1, 4, dtype=torch.int64), patch_nums=(1, 2))
