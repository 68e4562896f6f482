"""pyramid_update: a sampled scale is added to f_hat, the next scale's map drawn from it (VAR section 3.1, algorithm
2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend
from var_fast.ops.library import register
from var_fast.ops.multiscale_quantize import bicubic_up
from var_fast.ops.native import as_float32, misfit, pointer


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
    Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run: native takes
    float32 and a phi of 3x3, and no input that requires a gradient.
    """
    if idx_Bl.shape != (f_hat_BChw.shape[0], pn * pn):
        raise ValueError(f"idx_Bl has shape {tuple(idx_Bl.shape)}, expected {(f_hat_BChw.shape[0], pn * pn)}")
    inputs = idx_Bl, codebook_VC, phi_weight, phi_bias, float(phi_ratio), f_hat_BChw, pn, pn_next
    chosen = choose_backend("pyramid_update", f_hat_BChw.device, backend, lambda: _native_misfit(*inputs))
    return (_native if chosen == "native" else pyramid_update_reference)(*inputs)


# -------------------------------------------------------------------------------------------------------------- native
def _native_misfit(idx_Bl, codebook_VC, phi_weight, phi_bias, phi_ratio, f_hat_BChw, pn, pn_next) -> str | None:
    C = f_hat_BChw.shape[1]
    if codebook_VC.dim() != 2 or codebook_VC.shape[1] != C:
        return f"it takes a codebook of f_hat's {C} channels"
    if phi_weight is not None and phi_weight.shape != (C, C, 3, 3):
        return f"it takes a phi_weight of {(C, C, 3, 3)}, and was given {tuple(phi_weight.shape)}"
    if phi_bias is not None and phi_bias.shape != (C,):
        return f"it takes a phi_bias of {(C,)}, and was given {tuple(phi_bias.shape)}"
    if f_hat_BChw.dtype != torch.float32 or idx_Bl.dtype != torch.int64 or idx_Bl.device != f_hat_BChw.device:
        return "it takes a float32 f_hat and int64 indices beside it"
    return misfit(f_hat_BChw, codebook_VC, phi_weight, phi_bias)


def _run_native(idx_Bl, codebook_VC, phi_weight, phi_bias, phi_ratio, f_hat_BChw, pn, pn_next):
    from var_fast import _C

    B, C, h, w = f_hat_BChw.shape
    if idx_Bl.numel() > 0:
        least, largest = (int(end) for end in idx_Bl.aminmax())
        if least < 0 or largest >= codebook_VC.shape[0]:
            raise IndexError(f"idx_Bl has {least} to {largest}, expected indices of {codebook_VC.shape[0]} codes")
    idx_Bl, codebook_VC, f_new_BChw = idx_Bl.contiguous(), as_float32(codebook_VC), f_hat_BChw.contiguous()
    phi_weight, phi_bias = as_float32(phi_weight), as_float32(phi_bias)
    next_BlC = f_hat_BChw.new_empty(B, pn_next * pn_next, C)
    _C.cpu_pyramid_update(
        pointer(idx_Bl),
        0,  # codes: looked up
        pointer(codebook_VC),
        pointer(phi_weight),
        pointer(phi_bias),
        phi_ratio,
        pointer(f_new_BChw),
        B,
        C,
        h,
        w,
        pn,
        pn_next,
        pointer(next_BlC),
        torch.get_num_threads(),
    )
    if f_new_BChw is not f_hat_BChw:
        f_hat_BChw.copy_(f_new_BChw)
    return _as_map(next_BlC, pn_next)


def _as_map(next_BlC, pn_next):
    return next_BlC.transpose(1, 2).unflatten(2, (pn_next, pn_next))


def _fake_native(idx_Bl, codebook_VC, phi_weight, phi_bias, phi_ratio, f_hat_BChw, pn, pn_next):
    return _as_map(f_hat_BChw.new_empty(f_hat_BChw.shape[0], pn_next * pn_next, f_hat_BChw.shape[1]), pn_next)


_native = register(
    "pyramid_update_native",
    "(Tensor idx_Bl, Tensor codebook_VC, Tensor? phi_weight, Tensor? phi_bias, float phi_ratio, "
    "Tensor(a!) f_hat_BChw, int pn, int pn_next) -> Tensor",
    _run_native,
    _fake_native,
)
