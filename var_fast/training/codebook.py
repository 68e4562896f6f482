"""Making the tokenizer's codebook, and keeping it alive.

A code that is never the nearest gets no gradient and stays unused for ever. So codes unused over a window of steps
are put where they are needed: on residual vectors of the current batch, which are what the quantizer searches for.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from var_fast.errors import UserError
from var_fast.models import VQVAE
from var_fast.ops import multiscale_quantize
from var_fast.training.kmeans import kmeans
from var_fast.training.ranks import Ranks

STARTS = ("kmeans", "data", "random")


@torch.no_grad()
def residual_vectors(vae: VQVAE, img_B3HW: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per scale: the vectors the quantizer looks codes up for, (N, Cvae), and their squared distances to these codes,
    (N,), taken at unit length with `using_znorm`, as the quantizer compares them.
    """
    quantize = vae.quantize
    codebook_VC = quantize.embedding.weight
    searched: list[torch.Tensor] = []
    idx_Bl_per_scale, _ = multiscale_quantize(
        vae.encode(img_B3HW).float(),
        codebook_VC,
        quantize.quant_resi.__getitem__,
        quantize.v_patch_nums,
        quantize.using_znorm,
        on_residual=searched.append,
    )
    found = []
    for z_NC, idx_Bl in zip(searched, idx_Bl_per_scale, strict=True):
        code_NC = codebook_VC[idx_Bl.flatten()]
        pair = (F.normalize(z_NC, dim=-1), F.normalize(code_NC, dim=-1)) if quantize.using_znorm else (z_NC, code_NC)
        found.append((z_NC, (pair[0] - pair[1]).square().sum(1)))
    return found


def draw_candidates(
    scales: list[tuple[torch.Tensor, torch.Tensor]], count: int, generator: torch.Generator
) -> torch.Tensor:
    """Up to `count` vectors, (n, Cvae): badly served ones more likely (in proportion to their squared distance).

    Each scale gets a share in proportion to its side, not to its area: coarse scales have few vectors, but each
    of theirs covers a large part of the picture.
    """
    pieces = []
    for z_NC, distance_N in scales:
        side = z_NC.shape[0] ** 0.5
        total = sum(z.shape[0] ** 0.5 for z, _ in scales)
        share = min(z_NC.shape[0], -(-int(count * side) // int(total)) if total >= 1 else count)
        pieces.append(z_NC[torch.multinomial(distance_N + 1e-12, max(1, share), generator=generator)])
    pool = torch.cat(pieces)
    return pool[torch.randperm(pool.shape[0], device=pool.device, generator=generator)[:count]]


@torch.no_grad()
def revive_codes(
    vae: VQVAE,
    dead_V: torch.Tensor,
    img_B3HW: torch.Tensor,
    seed: int,
    *,
    ranks: Ranks | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    average: VQVAE | None = None,
) -> int:
    """Move the codes `dead_V` (V,) bool onto residual vectors of the batch; returns how many were moved.

    Their rows of the optimizer's state start afresh, and `average` (the EMA model) gets the same rows. Collective:
    img is this rank's share of the batch, as large as the others'; dead_V and seed are the same on all ranks, and so
    is what is drawn, from the vectors of the whole batch.
    """
    rows = dead_V.nonzero().flatten()
    if not rows.numel():
        return 0
    ranks = ranks or Ranks()
    weight = vae.quantize.embedding.weight
    scales = [tuple(ranks.concatenate(part) for part in scale) for scale in residual_vectors(vae, img_B3HW)]
    if not all(torch.isfinite(distance_N).all() for _, distance_N in scales):
        return 0  # the run is lost; the loop says so
    generator = torch.Generator(weight.device).manual_seed(seed)
    fresh_NC = draw_candidates(scales, rows.numel(), generator)
    order = torch.randperm(rows.numel(), device=rows.device, generator=generator)
    rows = rows[order[: fresh_NC.shape[0]]]
    weight[rows] = fresh_NC.to(weight.dtype)
    if average is not None:
        average.quantize.embedding.weight[rows] = fresh_NC.to(weight.dtype)
    state = optimizer.state.get(weight) if optimizer is not None else None
    if state:
        live_V = torch.ones_like(dead_V)
        live_V[rows] = False
        second = state["exp_avg_sq"]
        state["exp_avg"][rows] = 0.0
        # The typical scale of live rows, not zero: with zero the first steps of a revived code would be huge.
        second[rows] = second[live_V].mean(0) if live_V.any() else 0.0
    return rows.numel()


@torch.no_grad()
def start_codebook(
    vae: VQVAE, kind: str, batches: Iterable[torch.Tensor], seed: int, ranks: Ranks | None = None
) -> None:
    """The codes a run begins with; `kind` is one of STARTS. Collective: all ranks get the same codes.

    "kmeans": the k-means centres of what the encoder makes of `batches` (this rank's pictures (B, 3, H, W), of one
    size on all ranks), at all scales. "data": vectors drawn from the first batch, long ones more likely; codes
    that find none are zero. "random": uniform in +-1 / vocab_size. Raises UserError where the encoder's vectors are
    not finite.
    """
    ranks = ranks or Ranks()
    weight = vae.quantize.embedding.weight
    if kind == "random":
        generator = torch.Generator().manual_seed(seed)
        weight.copy_(torch.rand(weight.shape, generator=generator).mul(2).sub(1).div(vae.vocab_size))
        return
    # With every code at zero no scale takes anything away: the vectors are the feature map's own, at all sizes.
    weight.zero_()
    if kind == "data":
        revive_codes(vae, torch.ones_like(weight[:, 0], dtype=torch.bool), next(iter(batches)), seed, ranks=ranks)
        return
    parts: list[list[torch.Tensor]] = [[] for _ in vae.quantize.v_patch_nums]
    for img_B3HW in batches:
        for part, (z_NC, _) in zip(parts, residual_vectors(vae, img_B3HW), strict=True):
            part.append(ranks.concatenate(z_NC))
    scales = [torch.cat(part) for part in parts]
    # A scale counts by its side, as in draw_candidates.
    weight_N = torch.cat([z_NC.new_full((len(z_NC),), len(z_NC) ** -0.5) for z_NC in scales])
    z_NC = torch.cat(scales)
    if not torch.isfinite(z_NC).all():
        raise UserError("the encoder's features are not finite: nothing to start a codebook from")
    generator = torch.Generator(weight.device).manual_seed(seed)
    centre_VC = kmeans(z_NC, weight_N, vae.vocab_size, generator, cosine=vae.quantize.using_znorm)
    # Sums on a GPU differ in their last bits from rank to rank: one rank's are taken.
    weight.copy_(ranks.from_main(centre_VC.cpu() if ranks.is_main else None))
