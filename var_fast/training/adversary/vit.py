"""The frozen vision transformer whose features the DINO discriminator reads (Caron et al. 2021, Emerging properties in
self-supervised vision transformers; the architecture is that of Dosovitskiy et al. 2021)."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import nn

from var_fast.errors import UserError
from var_fast.training.weight_files import load_frozen, read_weights

PATCH, HEAD, LEAST_SIDE = 16, 64, 32
"""Pixels of a patch's side, channels of an attention head: those of ViT-S/16 (384 channels, 6 heads, 12 blocks); and
pixels of the smallest picture: the heads look at 9 tokens at once, around the ends of no fewer than 4."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DINO_FILE = "the published file dino_deitsmall16_pretrain.pth (ViT-S/16 trained by DINO)"


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        B, L, C = x_BLC.shape
        q_BHLD, k_BHLD, v_BHLD = self.qkv(x_BLC).view(B, L, 3, C // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        # In full: the gradient penalty differentiates twice, which the fused attention cannot.
        weight_BHLL = (q_BHLD @ k_BHLD.transpose(-2, -1) * HEAD**-0.5).softmax(-1)
        return self.proj((weight_BHLL @ v_BHLD).transpose(1, 2).reshape(B, L, C))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLC)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width)

    def forward(self, x_BLC: torch.Tensor) -> torch.Tensor:
        x_BLC = x_BLC + self.attn(self.norm1(x_BLC))
        return x_BLC + self.mlp(self.norm2(x_BLC))


class PatchEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, img_B3HW: torch.Tensor) -> torch.Tensor:
        return self.proj(img_B3HW).flatten(2).transpose(1, 2)


class VitFeatures(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> features (B, width, patches): before the first block, and after the last one
    of each quarter of the blocks. The class token is added to every patch, as Sauer et al. 2023 read features out.

    Pictures whose side is no multiple of 16 are enlarged to the next one, and to 32 at least; position embeddings are
    interpolated to the grid. Names of parameters are those of the published file.
    """

    def __init__(self, width: int = 384, depth: int = 12, grid: int = 14) -> None:
        super().__init__()
        self.grid = grid
        self.read_after = sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch_embed = PatchEmbedding(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)

    @property
    def widths(self) -> list[int]:
        """Channels of every feature map."""
        return [self.cls_token.shape[-1]] * (1 + len(self.read_after))

    def forward(self, img_B3HW: torch.Tensor) -> list[torch.Tensor]:
        size = tuple(max(LEAST_SIDE, -(-side // PATCH) * PATCH) for side in img_B3HW.shape[-2:])
        if size != tuple(img_B3HW.shape[-2:]):
            img_B3HW = F.interpolate(img_B3HW, size, mode="bilinear", align_corners=False)
        x_BLC = self.patch_embed((img_B3HW.add(1).mul(0.5) - self.mean) / self.deviation)
        x_BLC = torch.cat([self.cls_token.expand(len(x_BLC), -1, -1), x_BLC], 1) + self._positions(size)
        features = [_read_out(x_BLC)]
        for number, block in enumerate(self.blocks, 1):
            x_BLC = block(x_BLC)
            if number in self.read_after:
                features.append(_read_out(x_BLC))
        return features

    def _positions(self, size: tuple[int, int]) -> torch.Tensor:
        rows, columns = size[0] // PATCH, size[1] // PATCH
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        grid_1Cgg = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        grid_1Chw = F.interpolate(grid_1Cgg, (rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], grid_1Chw.flatten(2).transpose(1, 2)], 1)


def _read_out(x_BLC: torch.Tensor) -> torch.Tensor:
    return (x_BLC[:, 1:] + x_BLC[:, :1]).transpose(1, 2)


def load_vit(path: str) -> VitFeatures:
    """The frozen ViT of the published state dict; width and number of blocks are those of the file.

    Raises UserError that says what file is needed where there is none, or another.
    """
    state = read_weights("dino_weights", path, DINO_FILE)
    numbers = [int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))]
    position = state.get("pos_embed")
    grid = round((position.shape[1] - 1) ** 0.5) if position is not None and position.ndim == 3 else 0
    if not numbers or not grid or grid * grid + 1 != position.shape[1] or position.shape[2] % HEAD:
        raise UserError(f"dino_weights: {path} holds no such vision transformer, expected {DINO_FILE}")
    vit = VitFeatures(position.shape[2], 1 + max(numbers), grid)
    load_frozen(vit, state, "dino_weights", path)
    return vit
