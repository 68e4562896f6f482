"""multiscale_quantize: the residual pyramid of one feature map (VAR section 3.1, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from var_fast.ops.backend import choose_backend
from var_fast.ops.codebook_search import codebook_search


def scale_position(si: int, num_scales: int) -> float:
    """Where scale `si` lies between the first (0) and the last (1): chooses the phi layer."""
    return si / max(num_scales - 1, 1)


def area_down(f_BChw: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mean over areas down to `size`; the map itself where it has that size."""
    return f_BChw if f_BChw.shape[-2:] == size else F.interpolate(f_BChw, size=size, mode="area")


def bicubic_up(h_BCpp: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bicubic interpolation up to `size`; the map itself where it has that size."""
    if h_BCpp.shape[-2:] == size:
        return h_BCpp.contiguous()
    return F.interpolate(h_BCpp, size=size, mode="bicubic").contiguous()


def multiscale_quantize_reference(f_BChw, codebook_VC, phi, patch_nums, cosine=False, on_scale=None, on_residual=None):
    sizes = [(pn, pn) if isinstance(pn, int) else tuple(pn) for pn in patch_nums]
    B, C, h, w = f_BChw.shape
    f_rest, f_hat, idx_per_scale = f_BChw.clone(), torch.zeros_like(f_BChw), []
    for si, (ph, pw) in enumerate(sizes):
        z_NC = area_down(f_rest, (ph, pw)).permute(0, 2, 3, 1).reshape(-1, C)
        if on_residual is not None:
            on_residual(z_NC)
        idx_Bl = codebook_search(z_NC, codebook_VC, cosine).view(B, ph * pw)
        h_BCpp = F.embedding(idx_Bl, codebook_VC).transpose(1, 2).reshape(B, C, ph, pw)
        h_BChw = phi(scale_position(si, len(sizes)))(bicubic_up(h_BCpp, (h, w)))
        f_hat, f_rest = f_hat + h_BChw, f_rest - h_BChw.detach()
        idx_per_scale.append(idx_Bl)
        if on_scale is not None:
            on_scale(f_hat)
    return idx_per_scale, f_hat


def multiscale_quantize(
    f_BChw: torch.Tensor,
    codebook_VC: torch.Tensor,
    phi: Callable[[float], Callable[[torch.Tensor], torch.Tensor]],
    patch_nums: Sequence[int] | Sequence[tuple[int, int]],
    cosine: bool = False,
    *,
    on_scale: Callable[[torch.Tensor], None] | None = None,
    on_residual: Callable[[torch.Tensor], None] | None = None,
    backend: str = "auto",
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tokens of every scale and the sum of their maps, each scale coding what the earlier ones left over.

    Shapes: f (B, C, h, w); codebook (V, C); patch_nums: sides (or (height, width) pairs) of the scales, the last
    equal to (h, w); phi(position in [0, 1]) -> layer on (B, C, h, w). Result: list of (B, l) int64, and f_hat (B, C,
    h, w). `on_scale` sees the f_hat of every scale, `on_residual` the vectors (B * l, C) that it looks codes up for.
    Gradients as the caller's grad mode says, never through the indices.
    Raises ValueError where the last scale is not (h, w), BackendUnavailable where a named backend cannot run.
    """
    last = patch_nums[-1] if not isinstance(patch_nums[-1], int) else (patch_nums[-1],) * 2
    if tuple(f_BChw.shape[-2:]) != tuple(last):
        raise ValueError(f"f_BChw is {tuple(f_BChw.shape[-2:])} wide, expected the last of patch_nums, {tuple(last)}")
    choose_backend("multiscale_quantize", f_BChw.device, backend)
    return multiscale_quantize_reference(f_BChw, codebook_VC, phi, patch_nums, cosine, on_scale, on_residual)
