"""codebook_search: the nearest code of each vector (VAR section 3.1, eq. 3; algorithm 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import BackendUnavailable, choose_backend
from var_fast.ops.library import register


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
    use_triton = choose_backend("codebook_search", z_NC.device, backend) == "triton" and triton_can_search(
        "codebook_search", z_NC, codebook_VC, backend
    )
    with torch.no_grad():
        return (_triton if use_triton else codebook_search_reference)(z_NC, codebook_VC, cosine)


MOST_CHANNELS = 128
"""Of a vector that the Triton kernel takes: it holds a tile of whole vectors in registers."""


def triton_can_search(op: str, z: torch.Tensor, codebook_VC: torch.Tensor, backend: str) -> bool:
    """Whether the Triton kernels take these types and sizes: they compute in float32.

    Raises BackendUnavailable, in the name of `op`, where they do not and the caller named `backend` "triton".
    """
    V, C = codebook_VC.shape
    if torch.float64 in (z.dtype, codebook_VC.dtype):
        problem = "it computes in float32, and was given float64"
    elif not 1 <= C <= MOST_CHANNELS or V == 0:
        problem = f"it takes 1 to {MOST_CHANNELS} channels and at least 1 code, and was given {C} and {V}"
    else:
        return True
    if backend == "triton":
        raise BackendUnavailable(f"{op}: backend 'triton' cannot run: {problem}")
    return False


# -------------------------------------------------------------------------------------------------------------- Triton
def _run(z_NC, codebook_VC, cosine):
    from var_fast.kernels import codebook_search as kernel

    return kernel.search(z_NC, kernel.prepare(codebook_VC, cosine), cosine)


_triton = register(
    "codebook_search_triton",
    "(Tensor z_NC, Tensor codebook_VC, bool cosine) -> Tensor",
    _run,
    lambda z_NC, codebook_VC, cosine: z_NC.new_empty(z_NC.shape[0], dtype=torch.int64),
)
