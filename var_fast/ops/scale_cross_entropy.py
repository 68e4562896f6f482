"""scale_cross_entropy: head and cross-entropy of the transformer, with loss and accuracy per scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from var_fast.ops.backend import choose_backend
from var_fast.ops.library import register


def scale_cross_entropy_reference(
    h_BLC, weight_VC, bias_V, target_BL, token_weight_BL=None, label_smoothing=0.0, patch_nums=None
):
    logits_BLV = F.linear(h_BLC, weight_VC, bias_V)
    B, L, V = logits_BLV.shape
    if token_weight_BL is None:
        token_weight_BL = logits_BLV.new_full((B, L), 1 / L)
    ce_BL = F.cross_entropy(
        logits_BLV.reshape(-1, V), target_BL.reshape(-1), label_smoothing=label_smoothing, reduction="none"
    ).view(B, L)
    loss = (ce_BL * token_weight_BL).sum(1).mean()
    hit_BL = (logits_BLV.detach().argmax(-1) == target_BL).to(ce_BL.dtype)
    lengths = [L] if patch_nums is None else _lengths_of_prefix(patch_nums, L)
    loss_S = torch.stack([part.mean() for part in ce_BL.detach().split(lengths, dim=1)])
    accuracy_S = torch.stack([part.mean() for part in hit_BL.split(lengths, dim=1)])
    return loss, loss_S, accuracy_S


def scale_cross_entropy(
    h_BLC: torch.Tensor,
    weight_VC: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_BL: torch.Tensor,
    token_weight_BL: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    patch_nums: Sequence[int] | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of the codes predicted from h by the head (weight, bias), and its parts by scale.

    loss = mean over B of the sum over L of token weight times cross-entropy; weights default to 1 / L.
    Shapes: h (B, L, C), weight (V, C), bias (V,), target (B, L) int64, token_weight (B, L). Result: loss (), and per
    scale of `patch_nums` (or of a prefix of them; None: one scale) mean loss (S,) and accuracy (S,), both without
    gradient. Raises ValueError where the shapes do not fit, BackendUnavailable where a named backend cannot run.

    Under autocast the products are in autocast's type and the results in float32. A target of -100 has no loss, as in
    F.cross_entropy; any other outside 0 to V - 1 raises in the reference, and makes the loss NaN in Triton, which does
    not look at the values before it is done. Triton computes the gradients with the loss, so that the logits of all
    tokens never exist at once; there is no second derivative.
    """
    if target_BL.shape != h_BLC.shape[:2]:
        raise ValueError(f"target_BL has shape {tuple(target_BL.shape)}, expected (B, L) = {tuple(h_BLC.shape[:2])}")
    arguments = h_BLC, weight_VC, bias_V, target_BL, token_weight_BL, label_smoothing, patch_nums
    if choose_backend("scale_cross_entropy", h_BLC.device, backend) == "triton":
        return _by_triton(*arguments)
    return scale_cross_entropy_reference(*arguments)


def _lengths_of_prefix(patch_nums, L):
    lengths = []
    for pn in patch_nums:
        if sum(lengths) == L:
            break
        lengths.append(pn * pn)
    if sum(lengths) != L:
        raise ValueError(f"h_BLC has L = {L} tokens, expected a prefix of the scales {tuple(patch_nums)}")
    return lengths


# ---------------------------------------------------------------------------------------------------- Triton, autograd
def _by_triton(h_BLC, weight_VC, bias_V, target_BL, token_weight_BL, label_smoothing, patch_nums):
    B, L, C = h_BLC.shape
    lengths = [L] if patch_nums is None else _lengths_of_prefix(patch_nums, L)
    if weight_VC.dim() != 2 or weight_VC.shape[1] != C:
        raise ValueError(f"weight_VC has shape {tuple(weight_VC.shape)}, expected (V, C) = (V, {C})")
    if bias_V is not None and bias_V.shape != weight_VC.shape[:1]:
        raise ValueError(f"bias_V has shape {tuple(bias_V.shape)}, expected (V,) = {tuple(weight_VC.shape[:1])}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 to 1")
    dtype = result_dtype = h_BLC.dtype
    if torch.is_autocast_enabled(h_BLC.device.type) and dtype != torch.float64:
        dtype, result_dtype = torch.get_autocast_dtype(h_BLC.device.type), torch.float32
    elif weight_VC.dtype != dtype or (bias_V is not None and bias_V.dtype != dtype):
        head = ", ".join(str(t.dtype) for t in (weight_VC, bias_V) if t is not None)
        raise ValueError(f"h_BLC is {dtype}, weight and bias are {head}: expected one type, or autocast")
    loss_dtype = result_dtype
    if token_weight_BL is not None:
        token_weight_BL = token_weight_BL.broadcast_to(B, L)
        loss_dtype = torch.promote_types(result_dtype, token_weight_BL.dtype)
    wanted = [t is not None and torch.is_grad_enabled() and t.requires_grad for t in (h_BLC, weight_VC, bias_V)]
    loss, statistics_2BL, *_ = _triton(
        h_BLC, weight_VC, bias_V, target_BL, token_weight_BL, float(label_smoothing), dtype, wanted, True
    )
    means_2L = statistics_2BL.mean(1)
    means_2S = torch.stack([part.mean(1) for part in means_2L.split(lengths, dim=1)], dim=1)
    return loss.to(loss_dtype), *means_2S.to(result_dtype).unbind(0)


def _run(h_BLC, weight_VC, bias_V, target_BL, token_weight_BL, label_smoothing, dtype, wanted, reuse):
    from var_fast.kernels import scale_cross_entropy as kernel

    return kernel.forward(h_BLC, weight_VC, bias_V, target_BL, token_weight_BL, label_smoothing, dtype, wanted)


def _fake(h_BLC, weight_VC, bias_V, target_BL, token_weight_BL, label_smoothing, dtype, wanted, reuse):
    (B, L, C), V = h_BLC.shape, weight_VC.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    dh, dweight, dbias = (shape if one else (0,) for shape, one in zip(((B, L, C), (V, C), (V,)), wanted, strict=True))
    return (
        h_BLC.new_empty((), dtype=wide),
        h_BLC.new_empty((2, B, L), dtype=wide),
        h_BLC.new_empty(dh),
        h_BLC.new_empty(dweight, dtype=wide),
        h_BLC.new_empty(dbias, dtype=wide),
        h_BLC.new_empty((), dtype=wide),
    )


def _save(ctx, inputs, output):
    h_BLC, weight_VC, bias_V, _, token_weight_BL, _, _, ctx.wanted, ctx.reuse = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in (h_BLC, weight_VC, bias_V, token_weight_BL)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the gradients of dh would be as large as dh
    ctx.save_for_backward(*output[1:])


@once_differentiable
def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 9
    statistics_2BL, dh_BLC, dweight_VC, dbias_V, scale = ctx.saved_tensors
    factor = scale * dloss
    gradients = [
        _scaled(gradient, factor, dtype, ctx.reuse) if wanted else None
        for gradient, dtype, wanted in zip((dh_BLC, dweight_VC, dbias_V), ctx.dtypes, ctx.wanted)
    ]
    dtoken_weight_BL = None
    if ctx.needs_input_grad[4]:
        dtoken_weight_BL = (statistics_2BL[0] * (dloss / statistics_2BL.shape[1])).to(ctx.dtypes[3])
    return *gradients, None, dtoken_weight_BL, None, None, None, None


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, reuse: bool) -> torch.Tensor:
    """gradient * factor as `dtype`; in its own memory where nobody will look at `gradient` again, since dh is most of
    what the operator holds."""
    if type(gradient) is not torch.Tensor:  # traced by a compiler, which looks after memory itself
        return (gradient.to(factor.dtype) * factor).to(dtype)
    from var_fast.kernels import scale_cross_entropy as kernel

    return kernel.scaled(gradient, factor, dtype, in_place=reuse and not _graph_is_kept())


def _graph_is_kept() -> bool:
    """Whether backward may come again (retain_graph); where this version of torch does not tell, it may."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


# `wanted`: which gradients, of h, weight and bias, to compute; `reuse`: the caller drops the results after the second,
# so that the backward may overwrite them.
_triton = register(
    "scale_cross_entropy_triton",
    "(Tensor h_BLC, Tensor weight_VC, Tensor? bias_V, Tensor target_BL, Tensor? token_weight_BL, float label_smoothing,"
    " ScalarType dtype, bool[] wanted, bool reuse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    backward=_backward,
    setup_context=_save,
)
