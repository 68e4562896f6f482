from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from var_fast.training.order import batch_positions, epoch_order, examples_at, position_seed, share_of, step_seed


def test_every_epoch_takes_each_example_once_in_another_order():
    seen = examples_at(range(20), 10, seed=1)
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first == epoch_order(10, 0, 1).tolist() and first != epoch_order(10, 0, 2).tolist()


def test_seeds_differ():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(-2, 100)}
    seeds |= {position_seed(seed, place) for seed in range(20) for place in range(100)}
    assert len(seeds) == 20 * 102 + 20 * 100 and all(0 <= s < 2**63 for s in seeds)


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_shares_of_ranks_and_passes_make_up_the_step(step, share, ranks, parts):
    batch = share * ranks * parts
    found = [
        place
        for part in range(parts)
        for rank in range(ranks)
        for place in batch_positions(step, batch, rank=rank, ranks=ranks, part=part, parts=parts)
    ]
    assert found == list(range(step * batch, (step + 1) * batch))


def test_a_batch_that_cannot_be_shared_is_named():
    with pytest.raises(ValueError, match="batch is 6, expected a multiple of 2 ranks"):
        batch_positions(0, 6, ranks=2, parts=2)


@given(st.integers(0, 30), st.integers(1, 7))
def test_contiguous_shares_cover_all_and_are_even(count, ranks):
    shares = [share_of(range(count), rank, ranks) for rank in range(ranks)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
