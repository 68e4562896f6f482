"""FID, the Frechet distance between the features of two sets of pictures (Heusel et al. 2017, GANs trained by a two
time-scale update rule converge to a local Nash equilibrium, equation 6)."""

from __future__ import annotations

import torch

from var_fast.errors import UserError
from var_fast.training.ranks import Ranks


class FeatureStatistics:
    """Mean and covariance of feature vectors that come a batch at a time; float64, on the device of the features."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean_D = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter_DD = torch.zeros(width, width, dtype=torch.float64, device=device)

    @classmethod
    def known(cls, mean_D: torch.Tensor, covariance_DD: torch.Tensor) -> FeatureStatistics:
        """Statistics computed elsewhere. Raises UserError if they are no mean and covariance of one width."""
        width = mean_D.numel()
        if mean_D.ndim != 1 or not width or covariance_DD.shape != (width, width):
            raise UserError(
                f"mean and covariance have shapes {tuple(mean_D.shape)} and {tuple(covariance_DD.shape)}, "
                "expected (D,) and (D, D)"
            )
        statistics = cls(width)
        statistics.count = 2  # whatever it was, covariance_DD is what it comes to
        statistics.mean_D, statistics._scatter_DD = mean_D.double(), covariance_DD.double()
        if not bool(statistics.mean_D.isfinite().all() and statistics._scatter_DD.isfinite().all()):
            raise UserError("mean and covariance have values that are not finite")
        if not torch.allclose(covariance_DD, covariance_DD.T, rtol=1e-4, atol=1e-6 * float(covariance_DD.abs().max())):
            raise UserError("the covariance is not symmetric")
        return statistics

    @property
    def covariance_DD(self) -> torch.Tensor:
        """(D, D), divided by count - 1. Raises UserError for fewer than two pictures."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least two pictures, found {self.count}")
        return self._scatter_DD / (self.count - 1)

    def update(self, features_ND: torch.Tensor) -> None:
        """Adds N feature vectors. Raises UserError if they have another width or are not finite."""
        width = len(self.mean_D)
        if features_ND.ndim != 2 or features_ND.shape[1] != width:
            raise UserError(f"features have shape {tuple(features_ND.shape)}, expected (N, {width})")
        features_ND = features_ND.to(self.mean_D.device, torch.float64)
        if not bool(features_ND.isfinite().all()):
            raise UserError("features are not finite numbers")
        if not len(features_ND):
            return
        # Around the batch's own mean: sums of squares around 0 would lose digits (Chan et al. 1979).
        mean_D = features_ND.mean(0)
        centred_ND = features_ND - mean_D
        total = self.count + len(features_ND)
        shift_D = mean_D - self.mean_D
        self._scatter_DD += centred_ND.T @ centred_ND
        self._scatter_DD += torch.outer(shift_D, shift_D) * (self.count * len(features_ND) / total)
        self.mean_D = self.mean_D + shift_D * (len(features_ND) / total)
        self.count = total

    def merge(self, ranks: Ranks) -> None:
        """Replaces each rank's statistics by those of all ranks together; on the device of the ranks."""
        own, device = self.count, self.mean_D.device
        count = ranks.sum_(torch.tensor(own, device=device))
        mean_D = ranks.sum_(self.mean_D * own) / count.clamp(min=1)
        shift_D = self.mean_D - mean_D
        self._scatter_DD = ranks.sum_(self._scatter_DD + own * torch.outer(shift_D, shift_D))
        self.mean_D, self.count = mean_D, int(count)


def fid(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of means m and covariances S.

    The trace of the root is the sum of the singular values of S_a^(1/2) S_b^(1/2), which are the roots of the
    eigenvalues of S_a^(1/2) S_b S_a^(1/2): real and not negative, so that nothing is to be cut off or regularised where
    there are fewer pictures than features. Raises UserError for features of different widths.
    """
    if a.mean_D.shape != b.mean_D.shape:
        raise UserError(f"features have widths {len(a.mean_D)} and {len(b.mean_D)}, expected those of one network")
    covariance_a, covariance_b = a.covariance_DD, b.covariance_DD.to(a.mean_D.device)
    distance = (a.mean_D - b.mean_D.to(a.mean_D.device)).square().sum()
    root = torch.linalg.svdvals(_root(covariance_a).T @ _root(covariance_b)).sum()
    return float(distance + covariance_a.trace() + covariance_b.trace() - 2 * root)


def _root(covariance_DD: torch.Tensor) -> torch.Tensor:
    """R with R R^T = covariance, up to a rotation that changes no singular value of a product R_a^T R_b."""
    value_D, vector_DD = torch.linalg.eigh((covariance_DD + covariance_DD.T) / 2)
    # What rounding leaves of an eigenvalue 0 is not to be rooted: 1e-16 would become 1e-8.
    noise = len(value_D) * torch.finfo(torch.float64).eps * value_D.abs().max()
    return vector_DD * torch.where(value_D > noise, value_D, 0).sqrt()
