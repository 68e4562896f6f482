"""pyramid_update: a sampled scale is added to f_hat, the next scale's map drawn from it (VAR section 3.1, algorithm
2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend
from var_fast.ops.multiscale_quantize import bicubic_up


def pyramid_update_reference(idx_Bl, codebook_VC, phi_weight, phi_bias, phi_ratio, f_hat_BChw, pn, pn_next):
    B, C, h, w = f_hat_BChw.shape
    h_BCpp = F.embedding(idx_Bl, codebook_VC).transpose(1, 2).reshape(B, C, pn, pn)
    h_BChw = bicubic_up(h_BCpp, (h, w))
    if phi_weight is not None:
        conv_BChw = F.conv2d(h_BChw, phi_weight, phi_bias, padding=phi_weight.shape[-1] // 2)
        h_BChw = h_BChw * (1 - phi_ratio) + conv_BChw * phi_ratio
    f_hat_BChw.add_(h_BChw)
    return F.interpolate(f_hat_BChw, size=(pn_next, pn_next), mode="area")


def pyramid_update(
    idx_Bl: torch.Tensor,
    codebook_VC: torch.Tensor,
    phi_weight: torch.Tensor | None,
    phi_bias: torch.Tensor | None,
    phi_ratio: float,
    f_hat_BChw: torch.Tensor,
    pn: int,
    pn_next: int,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Index -> code -> bicubic up -> phi -> added to f_hat in place -> area down to the next scale's map.

    phi(h) = (1 - ratio) h + ratio conv(h); phi_weight None: phi is the identity.
    Shapes: idx (B, pn * pn) int64; codebook (V, C); phi_weight (C, C, 3, 3), phi_bias (C,); f_hat (B, C, h, w);
    result (B, C, pn_next, pn_next). No gradient is needed in sampling, none is promised.
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run.
    """
    if idx_Bl.shape != (f_hat_BChw.shape[0], pn * pn):
        raise ValueError(f"idx_Bl has shape {tuple(idx_Bl.shape)}, expected {(f_hat_BChw.shape[0], pn * pn)}")
    choose_backend("pyramid_update", f_hat_BChw.device, backend)
    return pyramid_update_reference(idx_Bl, codebook_VC, phi_weight, phi_bias, phi_ratio, f_hat_BChw, pn, pn_next)
