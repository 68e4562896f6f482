"""What a model must compute and move at least: the stages behind `floor_s`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.backends import use_backend
from bench.case import Stage
from var_fast import VAR, VQVAE


def floor_s(work: Sequence[Stage], flops_per_s: float, bytes_per_s: float) -> float:
    """The stages one after the other, each limited by its operations or by its bytes."""
    return sum(max(flops / flops_per_s, size / bytes_per_s) for flops, size in work)


def sample_work(vae: VQVAE, var: VAR, batch: int, element_size: int) -> list[Stage]:
    """Guided sampling with the savings of DESIGN's section 4: one stage for the modulation, one for each scale, one for
    the decoder. Weights are read once a stage, keys and values once a scale."""
    depth, C, V = var.depth, var.C, var.V
    dense = _weights_per_token(var)  # per block
    modulation = _modulation_weights(var)
    stages = [Stage(2.0 * modulation * (batch + 1), element_size * modulation)]
    for si, (begin, end) in enumerate(var.begin_ends):
        tokens = end - begin
        # at the first scale guidance is 0 and the unconditional rows are all equal: one of them is enough
        rows, logit_rows = (batch + 1, batch) if si == 0 else (2 * batch, 2 * batch)
        flops = rows * tokens * depth * (2.0 * dense + 4.0 * C * end) + 2.0 * logit_rows * tokens * C * V
        size = depth * dense + C * V + depth * rows * 2 * C * end
        stages.append(Stage(flops, float(element_size * size)))
    return [*stages, Stage(batch * decoder_flops(vae), element_size * float(_parameters(vae.decoder)))]


def train_work(var: VAR, batch: int, element_size: int) -> list[Stage]:
    """Forward and backward (twice the forward's products, 2.5 times its attention), then AdamW: parameter, gradient
    and two moments read, three of them written, in float32."""
    depth, C, V, L = var.depth, var.C, var.V, var.L
    pairs = sum((end - begin) * end for begin, end in var.begin_ends)
    products = 2.0 * L * (depth * _weights_per_token(var) + C * V + var.Cvae * C) + 2.0 * _modulation_weights(var)
    flops = batch * (3 * products + 3.5 * 4.0 * C * pairs * depth)
    parameters = _parameters(var)
    return [Stage(flops, 3.0 * element_size * parameters), Stage(0.0, 7.0 * 4 * parameters)]


def tokenize_work(vae: VQVAE, batch: int, element_size: int, decode: bool) -> list[Stage]:
    """Encoder, the search through the codebook for every token, and the decoder where the image is made again."""
    tokens = sum(pn * pn for pn in vae.quantize.v_patch_nums)
    stages = [
        Stage(batch * encoder_flops(vae), element_size * float(_parameters(vae.encoder))),
        Stage(2.0 * batch * tokens * vae.Cvae * vae.vocab_size, 4.0 * vae.Cvae * vae.vocab_size),
    ]
    if decode:
        stages.append(Stage(batch * decoder_flops(vae), element_size * float(_parameters(vae.decoder))))
    return stages


def encoder_flops(vae: VQVAE) -> float:
    """Operations of one image's encoder."""
    return _coder_flops(json.dumps(vae.config))[0]


def decoder_flops(vae: VQVAE) -> float:
    """Operations of one image's decoder. The convolution after a nearest up-sampling is counted as the four 2x2
    convolutions that it equals: 16 in place of 36 products for an input pixel and a pair of channels."""
    return _coder_flops(json.dumps(vae.config))[1]


@cache
def _coder_flops(config: str) -> tuple[float, float]:
    with torch.device("meta"):
        vae = VQVAE(**json.loads(config))
        side = vae.quantize.v_patch_nums[-1]
        image_13HW = torch.empty(1, 3, side * vae.downsample, side * vae.downsample)
        f_hat_1Chw = torch.empty(1, vae.Cvae, side, side)
    with use_backend("reference"), FlopCounterMode(display=False) as encoder:
        vae.encode(image_13HW)
    with use_backend("reference"), FlopCounterMode(display=False) as decoder:
        vae.fhat_to_img(f_hat_1Chw)
    saved = 0
    for level in reversed(vae.decoder.up):
        if hasattr(level, "upsample"):
            saved += 2 * (36 - 16) * level.upsample.conv.in_channels**2 * side**2
            side *= 2
    return float(encoder.get_total_flops()), float(decoder.get_total_flops() - saved)


def _weights_per_token(var: VAR) -> int:
    """Weights of a block's products: qkv and projection, and the two of the FFN."""
    attention, ffn = var.blocks[0].attn, var.blocks[0].ffn
    layers = (attention.mat_qkv, attention.proj, ffn.fc1, ffn.fc2)
    return sum(layer.weight.numel() for layer in layers)


def _modulation_weights(var: VAR) -> int:
    own = var.shared_ada_lin[1] if var.blocks[0].shared_aln else var.blocks[0].ada_lin[1]
    return own.weight.numel() * (1 if var.blocks[0].shared_aln else var.depth) + var.head_nm.ada_lin[1].weight.numel()


def _parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
