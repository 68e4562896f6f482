"""Statistics against numpy, the distance against closed forms, in one process and two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.two_ranks import on_two_ranks
from var_fast.errors import UserError
from var_fast.evaluation.fid import FeatureStatistics, fid

pytestmark = pytest.mark.usefixtures("one_thread")


def statistics(features: np.ndarray, *cuts: int) -> FeatureStatistics:
    found = FeatureStatistics(features.shape[1])
    for part in np.split(features, sorted(cuts)):
        found.update(torch.from_numpy(part))
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(1, 8), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 99))
def test_statistics_are_numpys(count, width, cuts, seed):
    # a mean far from 0, where sums of squares would lose all digits
    features = np.random.default_rng(seed).normal(1e4, 1.0, (count, width))
    found = statistics(features, *cuts)
    assert found.count == count
    np.testing.assert_allclose(found.mean_D.numpy(), features.mean(0), rtol=1e-12)
    expected = np.cov(features, rowvar=False).reshape(width, width)
    np.testing.assert_allclose(found.covariance_DD.numpy(), expected, rtol=1e-7, atol=1e-9)


def known(mean, covariance) -> FeatureStatistics:
    return FeatureStatistics.known(torch.tensor(mean).double(), torch.tensor(covariance).double())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_gaussians_with_common_axes(width, flat, seed):
    """For covariances Q diag(s) Q^T and Q diag(t) Q^T: |m - n|^2 + sum (sqrt s - sqrt t)^2."""
    rng = np.random.default_rng(seed)
    (m, n), (s, t) = rng.normal(size=(2, width)), rng.uniform(0, 5, (2, width))
    if flat:
        s[: width // 2], t[width // 3 :] = 0, 0  # singular, as with fewer pictures than features
    q, _ = np.linalg.qr(rng.normal(size=(width, width)))
    found = fid(known(m, q @ np.diag(s) @ q.T), known(n, q @ np.diag(t) @ q.T))
    expected = ((m - n) ** 2).sum() + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-7)


def test_against_numpys_root_of_the_product():
    """Covariances without common axes: tr (S_a S_b)^(1/2) is the sum of the roots of the eigenvalues of S_a S_b."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 10)) @ rng.normal(size=(10, 10)), rng.normal(0.5, 2.0, (150, 10))
    sa, sb = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(sa @ sb).real).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sa) + np.trace(sb) - 2 * root
    a, b = statistics(x, 50), statistics(y, 20, 90)
    assert fid(a, b) == pytest.approx(expected, rel=1e-10)
    assert fid(b, a) == pytest.approx(expected, rel=1e-10)
    assert fid(a, a) == pytest.approx(0.0, abs=1e-10)


def test_fewer_pictures_than_features():
    x = np.random.default_rng(1).normal(size=(20, 64))
    assert fid(statistics(x), statistics(x)) == pytest.approx(0.0, abs=1e-9)
    assert fid(statistics(x), statistics(x + 2.0)) == pytest.approx(64 * 4.0, rel=1e-10)


FEATURES = np.random.default_rng(2).normal(3.0, 1.0, (23, 5))


def _own_part(ranks):
    found = statistics(FEATURES[:9] if ranks.rank == 0 else FEATURES[9:])
    found.merge(ranks)
    return found.count, found.mean_D, found.covariance_DD


def _all_on_one(ranks):
    found = statistics(FEATURES[: 23 * ranks.rank])
    found.merge(ranks)
    return found.count, found.mean_D, found.covariance_DD


def test_two_ranks_merge():
    whole = statistics(FEATURES)
    for count, mean_D, covariance_DD in (each for told in on_two_ranks(_own_part, _all_on_one) for each in told):
        assert count == 23
        torch.testing.assert_close(mean_D, whole.mean_D, rtol=1e-13, atol=0)
        torch.testing.assert_close(covariance_DD, whole.covariance_DD, rtol=1e-12, atol=1e-14)


def test_refusals():
    one = FeatureStatistics(3)
    one.update(torch.ones(1, 3))
    with pytest.raises(UserError, match="at least two pictures, found 1"):
        fid(one, one)
    with pytest.raises(UserError, match="shape \\(2, 4\\), expected \\(N, 3\\)"):
        one.update(torch.ones(2, 4))
    with pytest.raises(UserError, match="not finite"):
        one.update(torch.full((1, 3), float("inf")))
    with pytest.raises(UserError, match="widths 2 and 1"):
        fid(known([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]), known([0.0], [[1.0]]))
    with pytest.raises(UserError, match="expected \\(D,\\) and \\(D, D\\)"):
        known([0.0, 0.0], [[1.0]])
    with pytest.raises(UserError, match="not symmetric"):
        known([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]])
    with pytest.raises(UserError, match="not finite"):
        known([float("nan")], [[1.0]])
