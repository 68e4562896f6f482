"""Editing of pictures (VAR section 5.4): in the region that is kept, every scale has the picture's own tokens.

The transformer samples all tokens of a scale as always; those of the kept region are then replaced, before the scale
enters the sum and the next scale's input. So what is sampled sees what is kept at all scales, and the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from var_fast.errors import UserError
from var_fast.models import VQVAE


def sampled_tokens(mask_BHW: torch.Tensor, patch_nums: Sequence[int]) -> list[torch.Tensor]:
    """Which tokens are made anew: for every scale (B, pn * pn) bool, of a mask (B, H, W) bool, True where pixels are.

    H and W are multiples of the last of `patch_nums`. A token is made anew if at least half of its area is masked. Its
    area is the one that the tokenizer averages for it: pixels to cells of the finest grid, these to the token's cell
    by F.interpolate(mode="area"), whose cells overlap where sides do not divide. Asking for any masked pixel instead
    would leave nothing of the picture at the coarse scales, on which all finer tokens build; asking for all pixels
    would keep too much of what is to go.

    The one token of a 1 x 1 scale, the picture's overall tone, is kept as long as one token of the finest scale is.
    """
    side = patch_nums[-1]
    # In float64 on the CPU all shares are exact near 1/2: no token depends on the device.
    share_B1hw = F.interpolate(mask_BHW.cpu().double().unsqueeze(1), size=(side, side), mode="area")
    all_B1 = (share_B1hw >= 0.5).flatten(1).all(dim=1, keepdim=True)
    sampled = []
    for pn in patch_nums:
        share_B1pp = F.interpolate(share_B1hw, size=(pn, pn), mode="area")
        sampled.append(all_B1 if pn == 1 else (share_B1pp >= 0.5).flatten(1))
    return [sampled_Bl.to(mask_BHW.device) for sampled_Bl in sampled]


class KeptTokens(NamedTuple):
    """For every scale B images' tokens (B, l) int64, and which of them are kept (B, l) bool.

    Called by a sampling loop with what it drew at a scale, it puts the kept tokens in their places.
    """

    idx_Bl: list[torch.Tensor]
    keep_Bl: list[torch.Tensor]
    codebook_VC: torch.Tensor

    def __call__(
        self, si: int, idx_Bl: torch.Tensor, codes_BlC: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        own_Bl, keep_Bl = self.idx_Bl[si], self.keep_Bl[si]
        if codes_BlC is not None:
            codes_BlC = torch.where(keep_Bl.unsqueeze(-1), F.embedding(own_Bl, self.codebook_VC), codes_BlC)
        return torch.where(keep_Bl, own_Bl, idx_Bl), codes_BlC


@torch.no_grad()
def kept_tokens(
    vae: VQVAE,
    image_B3HW: torch.Tensor,
    mask_BHW: torch.Tensor,
    patch_nums: Sequence[int],
    count: int,
    max_batch: int,
) -> list[KeptTokens]:
    """What is kept of `count` images, in parts of at most `max_batch`.

    image (B, 3, H, W) float32 in [0, 1], mask (B, H, W) bool; B is `count`, or 1 if it is the same for all. Images are
    encoded in float32: tokens are discrete, so that rounding would change them. Raises UserError for a mask too thin to
    make any token anew.
    """
    sampled = sampled_tokens(mask_BHW, patch_nums)
    thin_B = mask_BHW.flatten(1).any(dim=1) & ~sampled[-1].any(dim=1)
    if thin_B.any():
        pixels, cell = int(mask_BHW[thin_B][0].sum()), mask_BHW.shape[-1] // patch_nums[-1]
        raise UserError(
            f"mask is too thin: its {pixels} pixels nowhere cover half of a token's {cell} x {cell} pixels, "
            "expected at least one token to make anew"
        )
    encoded = [vae.img_to_idxBl(part_B3HW * 2 - 1, patch_nums) for part_B3HW in image_B3HW.split(max_batch)]
    own = [torch.cat(parts).expand(count, -1).split(max_batch) for parts in zip(*encoded, strict=True)]
    keep = [(~sampled_Bl).expand(count, -1).split(max_batch) for sampled_Bl in sampled]
    return [
        KeptTokens(list(own_Bl), list(keep_Bl), vae.quantize.embedding.weight.detach())
        for own_Bl, keep_Bl in zip(zip(*own), zip(*keep))
    ]


def check_image_and_mask(
    image: torch.Tensor, mask: torch.Tensor, count: int, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """image (B, 3, H, W) float32 and mask (B, H, W) bool on `device`, B 1 or `count`, of what `Sampler.edit` takes.

    Raises UserError that names the argument if H or W is not `size`, or B fits neither, or type or values are wrong.
    """
    image, mask = _tensor("image", image), _tensor("mask", mask)
    if not image.is_floating_point():
        raise UserError(f"image is {image.dtype}, expected floating-point numbers in [0, 1]")
    if mask.dtype != torch.bool:
        raise UserError(f"mask is {mask.dtype}, expected torch.bool, True where new content is made")
    if image.ndim not in (3, 4) or image.shape[-3:] != (3, size, size):
        expected = f"(3, {size}, {size}) or (B, 3, {size}, {size}): the model's size"
        raise UserError(f"image has shape {tuple(image.shape)}, expected {expected}")
    if mask.shape[-2:] != (size, size) or mask.ndim not in (2, 3, 4) or mask.ndim == 4 and mask.shape[1] != 1:
        expected = f"({size}, {size}), (B, {size}, {size}) or (B, 1, {size}, {size}): the image's size"
        raise UserError(f"mask has shape {tuple(mask.shape)}, expected {expected}")
    image_B3HW, mask_BHW = image.reshape(-1, 3, size, size), mask.reshape(-1, size, size)
    for name, found in (("image", len(image_B3HW)), ("mask", len(mask_BHW))):
        if found not in (1, count):
            raise UserError(f"{name} is {found} of them for {count} labels, expected one for all or one for each")
    bad_B3HW = ~((image_B3HW >= 0) & (image_B3HW <= 1))  # so that NaN is bad
    if bad_B3HW.any():
        raise UserError(f"image holds {image_B3HW[bad_B3HW][0].item():g}, expected values in [0, 1]")
    return image_B3HW.to(device, torch.float32), mask_BHW.to(device)


def _tensor(name: str, values: torch.Tensor) -> torch.Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} is {type(values).__name__}, expected a tensor: {error}") from error
