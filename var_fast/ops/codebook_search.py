"""codebook_search: the nearest code of each vector (VAR section 3.1, eq. 3; algorithm 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend


def codebook_search_reference(z_NC, codebook_VC, cosine=False):
    if cosine:
        return torch.argmax(F.normalize(z_NC, dim=-1) @ F.normalize(codebook_VC, dim=-1).T, dim=1)
    # |z|^2 is the same for all codes but stays in: it sets the rounding at which two codes count as tied.
    squared_NV = z_NC.square().sum(1, keepdim=True) + codebook_VC.square().sum(1)
    return torch.argmin(squared_NV.addmm_(z_NC, codebook_VC.T, alpha=-2, beta=1), dim=1)


def codebook_search(
    z_NC: torch.Tensor, codebook_VC: torch.Tensor, cosine: bool = False, *, backend: str = "auto"
) -> torch.Tensor:
    """Index of the nearest code of each vector: squared Euclidean distance, or cosine (`using_znorm`).

    Shapes: z (N, C), codebook (V, C), result (N,) int64; the lowest index wins a tie. No gradient.
    Raises ValueError where C differs, BackendUnavailable where a named backend cannot run.
    """
    if z_NC.dim() != 2 or codebook_VC.dim() != 2 or z_NC.shape[1] != codebook_VC.shape[1]:
        raise ValueError(
            f"z_NC and codebook_VC have shapes {tuple(z_NC.shape)} and {tuple(codebook_VC.shape)}, "
            "expected (N, C) and (V, C)"
        )
    choose_backend("codebook_search", z_NC.device, backend)
    with torch.no_grad():
        return codebook_search_reference(z_NC, codebook_VC, cosine)
