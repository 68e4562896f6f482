"""Guidance, top-k, top-p and the draw of one code index per token (VAR, Tian et al. 2024, sampling in section 3)."""

from __future__ import annotations

import math

import torch

from var_fast.errors import UserError
from var_fast.ops.backend import choose_backend
from var_fast.ops.philox import TOKEN_STREAM, exponentials

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def sample_tokens(
    cond_BlV: torch.Tensor,
    uncond_BlV: torch.Tensor | None,
    guidance: float,
    top_k: int,
    top_p: float,
    seed_B: torch.Tensor,
    scale: int,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Draw one code index for every token.

    The guided logits are (1 + guidance) cond - guidance uncond, or cond where `uncond_BlV` is None. Of them top-k and
    then top-p keep some (see `filter_logits_`). The index is drawn from their softmax p by a race: each code v has an
    exponential random number E_v of its own, and the one of the least E_v / p_v wins, which is v with probability p_v
    (it is the Gumbel-max trick). Logits that are off by a little, probabilities q, draw another code with probability
    sum |p_v - q_v| at most. The inverse of the cumulative distribution, which needs one random number only, has every
    code after one that is off shifted, and draws some ten times as many others.

    Every backend computes in float64, so that they answer alike, whatever the type of the logits. They may differ
    only where a cumulative probability meets 1 - top_p, or the two first of the race each other, to within float64
    rounding (1e-12).

    It is the operator torch.ops.var_fast.sample_tokens, so torch.compile takes it as one node; it has no gradient.

    Args:
        cond_BlV, uncond_BlV: logits with and without the class label, (B, l, V), one floating dtype.
        guidance: strength t of classifier-free guidance at this scale; 0 is no guidance.
        top_k: number of codes kept, ties with the last one included; 0 or V and more: all.
        top_p: probability mass kept, in [0, 1]; 0 or 1: all.
        seed_B: the images' seeds, (B,) int64; with `scale`, token and code they make the random numbers
            (`philox.exponentials`), so an image's draws do not depend on the others.
        scale: which token map this is, in [0, 2^32).
        backend: "auto", "reference" or "native" (CPU).

    Returns:
        (B, l) int64 indices into the codebook.

    Raises:
        UserError: an argument of the wrong shape, dtype or range; logits that are not finite.
    """
    return torch.ops.var_fast.sample_tokens.default(
        cond_BlV,
        uncond_BlV,
        float(guidance),
        min(int(top_k), cond_BlV.shape[-1]),
        float(top_p),
        seed_B,
        int(scale),
        backend,
    )


def sample_tokens_reference(
    cond_BlV: torch.Tensor,
    uncond_BlV: torch.Tensor | None,
    guidance: float,
    top_k: int,
    top_p: float,
    seed_B: torch.Tensor,
    scale: int,
) -> torch.Tensor:
    """`sample_tokens` in plain PyTorch, on any device: its definition."""
    return _sample(cond_BlV, uncond_BlV, guidance, top_k, top_p, seed_B, scale, "reference")


def filter_logits_(logits_BlV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set the logits that top-k and then top-p drop to -inf, in place; returns `logits_BlV`.

    top-k keeps the k largest and all that tie with the k-th. top-p walks through what is left in ascending order
    (ties: lower index first) and drops a code while the cumulative softmax probability, its own included, is at most
    1 - top_p; the best code always stays. The rule and its rounding in the logits' dtype are the published code's.

    Raises UserError for top_k < 0 or top_p outside [0, 1].
    """
    _check_filter(top_k, top_p)
    V = logits_BlV.shape[-1]
    if 0 < top_k < V:
        kth_largest = logits_BlV.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits_BlV.masked_fill_(logits_BlV < kth_largest, -torch.inf)
    if 0 < top_p < 1:
        ascending, order = logits_BlV.sort(dim=-1, stable=True)
        dropped = ascending.softmax(dim=-1).cumsum_(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        logits_BlV.masked_fill_(torch.empty_like(dropped).scatter_(-1, order, dropped), -torch.inf)
    return logits_BlV


def _sample(cond_BlV, uncond_BlV, guidance, top_k, top_p, seed_B, scale, backend) -> torch.Tensor:
    _check_tensors(cond_BlV, uncond_BlV, seed_B)
    _check_filter(top_k, top_p)
    if not math.isfinite(guidance):
        raise UserError(f"sample_tokens: guidance is {guidance}, expected a finite number")
    if not 0 <= scale < 2**32:
        raise UserError(f"scale is {scale}, expected a number in [0, 2^32)")
    run = {"reference": _run_reference, "native": _run_native}[
        choose_backend("sample_tokens", cond_BlV.device, backend)
    ]
    with torch.no_grad():
        return run(cond_BlV, uncond_BlV, float(guidance), int(top_k), float(top_p), seed_B, int(scale))


def _fake_sample(cond_BlV, uncond_BlV, guidance, top_k, top_p, seed_B, scale, backend) -> torch.Tensor:
    _check_tensors(cond_BlV, uncond_BlV, seed_B)
    return cond_BlV.new_empty(cond_BlV.shape[:2], dtype=torch.int64)


# Not torch.library.custom_op: its wrapper costs 0.2 ms a call and imports torch._dynamo (seconds) at the first.
torch.library.define(
    "var_fast::sample_tokens",
    "(Tensor cond_BlV, Tensor? uncond_BlV, float guidance, int top_k, float top_p, Tensor seed_B, "
    "int scale, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("var_fast::sample_tokens", "CompositeExplicitAutograd", _sample)
torch.library.register_fake("var_fast::sample_tokens", _fake_sample)


def _run_reference(cond_BlV, uncond_BlV, guidance, top_k, top_p, seed_B, scale) -> torch.Tensor:
    guided_BlV = cond_BlV.to(torch.float64, copy=True)
    if uncond_BlV is not None:
        guided_BlV = (1 + guidance) * guided_BlV - guidance * uncond_BlV.to(torch.float64)
    finite_B = guided_BlV.isfinite().flatten(1).all(dim=1)
    if not finite_B.all():
        _raise_not_finite(int(finite_B.logical_not().nonzero()[0]))
    p_BlV = filter_logits_(guided_BlV, top_k, top_p).softmax(dim=-1)
    return p_BlV.div_(exponentials(seed_B, TOKEN_STREAM, scale, *p_BlV.shape[1:])).argmax(dim=-1)


def _run_native(cond_BlV, uncond_BlV, guidance, top_k, top_p, seed_B, scale) -> torch.Tensor:
    from var_fast import _C

    B, l, V = cond_BlV.shape
    # float16 and bfloat16 are exact in float32, so that the extension needs two element types only
    dtype = torch.float64 if cond_BlV.dtype == torch.float64 else torch.float32
    cond = cond_BlV.to(dtype).contiguous()
    uncond = None if uncond_BlV is None else uncond_BlV.to(dtype).contiguous()
    seeds = seed_B.contiguous()
    idx_Bl = torch.empty(B, l, dtype=torch.int64)
    bad_image = _C.sample_tokens(
        cond.data_ptr(),
        0 if uncond is None else uncond.data_ptr(),
        dtype == torch.float64,
        B,
        l,
        V,
        guidance,
        top_k,
        top_p,
        seeds.data_ptr(),
        scale,
        idx_Bl.data_ptr(),
        torch.get_num_threads(),
    )
    if bad_image >= 0:
        _raise_not_finite(bad_image)
    return idx_Bl


def _raise_not_finite(image: int):
    raise UserError(f"sample_tokens: the logits of image {image} are not finite (NaN or inf): check the weights")


def _check_filter(top_k: int, top_p: float) -> None:
    if top_k < 0:
        raise UserError(f"top_k is {top_k}, expected 0 (off) or more")
    if not 0 <= top_p <= 1:
        raise UserError(f"top_p is {top_p}, expected a number in [0, 1] (0 or 1: off)")


def _check_tensors(cond_BlV: torch.Tensor, uncond_BlV: torch.Tensor | None, seed_B: torch.Tensor) -> None:
    if cond_BlV.ndim != 3 or cond_BlV.shape[-1] == 0:
        raise UserError(f"cond_BlV has shape {tuple(cond_BlV.shape)}, expected (B, l, V) with V > 0")
    if cond_BlV.dtype not in _FLOATS:
        raise UserError(f"cond_BlV has dtype {cond_BlV.dtype}, expected a floating-point type")
    if uncond_BlV is not None and (uncond_BlV.shape != cond_BlV.shape or uncond_BlV.dtype != cond_BlV.dtype):
        raise UserError(
            f"uncond_BlV is {tuple(uncond_BlV.shape)} {uncond_BlV.dtype}, "
            f"expected cond_BlV's {tuple(cond_BlV.shape)} {cond_BlV.dtype}"
        )
    devices = {x.device for x in (cond_BlV, uncond_BlV, seed_B) if x is not None}
    if len(devices) > 1:
        raise UserError(f"logits and seed_B are on {', '.join(sorted(map(str, devices)))}, expected one device")
    if seed_B.shape != cond_BlV.shape[:1] or seed_B.dtype != torch.int64:
        raise UserError(f"seed_B is {tuple(seed_B.shape)} {seed_B.dtype}, expected ({cond_BlV.shape[0]},) int64")
