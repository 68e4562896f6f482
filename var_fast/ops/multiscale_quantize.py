"""multiscale_quantize: the residual pyramid of one feature map (VAR section 3.1, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from var_fast.ops.backend import choose_backend
from var_fast.ops.codebook_search import codebook_search, codebook_search_reference, triton_can_search
from var_fast.ops.library import register


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


def token_maps(patch_nums: Sequence[int] | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(height, width) of every scale."""
    return [(pn, pn) if isinstance(pn, int) else tuple(pn) for pn in patch_nums]


def multiscale_quantize_reference(
    f_BChw,
    codebook_VC,
    phi,
    patch_nums,
    cosine=False,
    on_scale=None,
    on_residual=None,
    search=codebook_search_reference,
):
    sizes = token_maps(patch_nums)
    B, C, h, w = f_BChw.shape
    f_rest, f_hat, idx_per_scale = f_BChw.clone(), torch.zeros_like(f_BChw), []
    for si, (ph, pw) in enumerate(sizes):
        z_NC = area_down(f_rest, (ph, pw)).permute(0, 2, 3, 1).reshape(-1, C)
        if on_residual is not None:
            on_residual(z_NC)
        with torch.no_grad():
            idx_Bl = search(z_NC, codebook_VC, cosine).view(B, ph * pw)
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
    last = token_maps(patch_nums)[-1]
    if tuple(f_BChw.shape[-2:]) != last:
        raise ValueError(f"f_BChw is {tuple(f_BChw.shape[-2:])} wide, expected the last of patch_nums, {last}")
    if choose_backend("multiscale_quantize", f_BChw.device, backend) == "triton" and triton_can_search(
        "multiscale_quantize", f_BChw, codebook_VC, backend
    ):
        layers = phi_layers(phi, len(patch_nums))
        if layers is not None and on_residual is None and not _needs_gradient(codebook_VC, layers[0]):
            return _all_scales(f_BChw, codebook_VC, *layers, token_maps(patch_nums), cosine, on_scale)
    # Also where the kernels do not fit: they give no gradient and know no other layers. The search may be fast yet.
    search = partial(codebook_search, backend=backend)
    return multiscale_quantize_reference(f_BChw, codebook_VC, phi, patch_nums, cosine, on_scale, on_residual, search)


# -------------------------------------------------------------------------------------------------------------- Triton
def phi_layers(phi, num_scales: int) -> tuple[list[nn.Conv2d], list[int]] | None:
    """The different layers that phi(h) = (1 - resi_ratio) h + resi_ratio conv3x3(h) has over the scales, and which of
    them each scale takes, -1 where phi changes nothing. None where phi has layers of any other kind.
    """
    layers: list[nn.Conv2d] = []
    of_scale = []
    for si in range(num_scales):
        layer = phi(scale_position(si, num_scales))
        if isinstance(layer, nn.Identity):
            of_scale.append(-1)
            continue
        if not _is_mending_convolution(layer):
            return None
        if all(layer is not other for other in layers):
            layers.append(layer)
        of_scale.append([layer is other for other in layers].index(True))
    return layers, of_scale


def _is_mending_convolution(layer) -> bool:
    """Known by the attribute `resi_ratio`: operators do not know the modules that call them."""
    return (
        isinstance(layer, nn.Conv2d)
        and hasattr(layer, "resi_ratio")
        and layer.kernel_size == (3, 3)
        and layer.stride == layer.dilation == layer.padding == (1, 1)
        and (layer.groups, layer.padding_mode) == (1, "zeros")
        and layer.bias is not None
        and layer.weight.dtype != torch.float64
    )


def _needs_gradient(codebook_VC, layers) -> bool:
    tensors = [codebook_VC, *(parameter for layer in layers for parameter in (layer.weight, layer.bias))]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@torch.no_grad()
def _all_scales(f_BChw, codebook_VC, layers, layer_of_scale, sizes, cosine, on_scale):
    dtype = torch.promote_types(f_BChw.dtype, codebook_VC.dtype)
    idx, f_hats = _triton(
        f_BChw.detach(),
        codebook_VC.detach(),
        [layer.weight.detach() for layer in layers],
        [layer.bias.detach() for layer in layers],
        [float(layer.resi_ratio) for layer in layers],
        layer_of_scale,
        [side for size in sizes for side in size],
        cosine,
        on_scale is not None,
    )
    f_hats = f_hats.to(dtype).unbind(0)
    if on_scale is not None:
        for f_hat_BChw in f_hats:
            on_scale(f_hat_BChw)
    B = f_BChw.shape[0]
    idx_per_scale = idx.split([B * ph * pw for ph, pw in sizes])
    return [idx.view(B, ph * pw) for idx, (ph, pw) in zip(idx_per_scale, sizes)], f_hats[-1]


def _run(f_BChw, codebook_VC, phi_weights, phi_biases, ratios, layer_of_scale, sizes, cosine, every_sum):
    from var_fast.kernels import multiscale_quantize as kernel

    return kernel.quantize(
        f_BChw, codebook_VC, phi_weights, phi_biases, ratios, layer_of_scale, sizes, cosine, every_sum
    )


def _fake(f_BChw, codebook_VC, phi_weights, phi_biases, ratios, layer_of_scale, sizes, cosine, every_sum):
    tokens = sum(ph * pw for ph, pw in zip(sizes[::2], sizes[1::2]))
    idx = f_BChw.new_empty(f_BChw.shape[0] * tokens, dtype=torch.int64)
    return idx, f_BChw.new_empty(len(layer_of_scale) if every_sum else 1, *f_BChw.shape, dtype=torch.float32)


_triton = register(
    "multiscale_quantize_triton",
    "(Tensor f_BChw, Tensor codebook_VC, Tensor[] phi_weights, Tensor[] phi_biases, float[] ratios, "
    "int[] layer_of_scale, int[] sizes, bool cosine, bool every_sum) -> (Tensor, Tensor)",
    _run,
    _fake,
)
