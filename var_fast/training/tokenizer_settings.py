"""What a tokenizer run is made of: settings, presets, their checks, and the model they describe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from var_fast.errors import UserError
from var_fast.models import VQVAE
from var_fast.models.gradient_estimators import GRADIENTS
from var_fast.training.adversary import DISCRIMINATORS
from var_fast.training.checks import check_values, user_errors
from var_fast.training.codebook import STARTS
from var_fast.training.lpips import LEAST_SIDE
from var_fast.training.settings import setting

PRECISIONS = ("float32", "bfloat16")

_MODEL, _LOSS, _RUN = "Model", "Losses", "Optimisation"
_GAN, _CODES = "Discriminator", "Codebook"


@dataclass(frozen=True)
class TokenizerSettings:
    """All of a tokenizer run but its data and its length. A resumed run must have the same, but for paths."""

    size: int = setting(32, "Pixels per side.", panel=_MODEL)
    vocab_size: int = setting(2048, "Codes.", panel=_MODEL)
    z_channels: int = setting(16, "Channels of a code.", panel=_MODEL)
    ch: int = setting(32, "Channels at full resolution.", panel=_MODEL)
    ch_mult: tuple[int, ...] = setting((1, 2, 2), "Channel factors, one per resolution.", panel=_MODEL)
    patch_nums: tuple[int, ...] = setting((1, 2, 3, 4, 5, 6, 8), "Side of each scale's token map.", panel=_MODEL)
    quant_resi: float = setting(0.5, "Part of phi's convolution in what a scale adds; 0: no phi.", panel=_MODEL)
    share_quant_resi: int = setting(4, "Phi layers shared by the scales; 0: one for each scale.", panel=_MODEL)
    using_znorm: bool = setting(False, "Compare vectors and codes by cosine.", panel=_MODEL)

    batch: int = setting(32, "Pictures per step, of all ranks together.", panel=_RUN)
    lr: float = setting(1e-3, "Peak learning rate.", panel=_RUN)
    final_lr: float = setting(0.02, "Learning rate at the end, as part of the peak.", panel=_RUN)
    warmup_steps: int = setting(100, "Steps in which the learning rates grow from 0.", panel=_RUN)
    weight_decay: float = setting(0.01, "Weight decay of AdamW; none on codes, biases and norms.", panel=_RUN)
    clip: float = setting(1.0, "Most norm of a step's gradient; 0: any.", panel=_RUN)
    ema: float = setting(0.995, "Decay of the averaged weights.", panel=_RUN)
    flip: bool = setting(True, "Mirror pictures half of the time.", panel=_RUN)
    enlarge: float = setting(1.125, "Size of a picture's shorter side, in sides of the window cut from it.", panel=_RUN)
    channels_last: bool = setting(True, "Memory layout of the convolutions.", panel=_RUN)
    precision: str = setting("float32", "Of encoder and decoder: float32 or bfloat16 (autocast).", panel=_RUN)
    seed: int = setting(0, "Everything random follows from it.", panel=_RUN)

    l1: float = setting(1.0, "Weight of the mean absolute error.", panel=_LOSS)
    l2: float = setting(1.0, "Weight of the mean squared error.", panel=_LOSS)
    vq: float = setting(1.0, "Weight of the codebook and commitment loss.", panel=_LOSS)
    beta: float = setting(0.25, "Weight of the commitment in it.", panel=_LOSS)
    lpips: float = setting(0.0, "Weight of the perceptual loss LPIPS; needs two weight files.", panel=_LOSS)
    lpips_weights: str = setting("", "LPIPS's linear layers (vgg.pth of lpips).", compare=False, panel=_LOSS)
    vgg_weights: str = setting("", "VGG16's state dict (torchvision), for LPIPS.", compare=False, panel=_LOSS)

    discriminator: str = setting("none", "none, patchgan, or dino (needs a weight file).", panel=_GAN)
    dino_weights: str = setting("", "dino_deitsmall16_pretrain.pth, for dino.", compare=False, panel=_GAN)
    gan: float = setting(0.5, "Weight of the adversarial loss.", panel=_GAN)
    gan_start: int = setting(1000, "First step with a discriminator.", panel=_GAN)
    gan_warmup: int = setting(0, "Steps from there in which its weight grows from 0.", panel=_GAN)
    disc_lr: float = setting(2e-4, "Peak learning rate of the discriminator.", panel=_GAN)
    adaptive_weight: bool = setting(True, "Times the ratio of the gradients at the decoder's end.", panel=_GAN)
    adaptive_most: float = setting(1e4, "Most of that ratio.", panel=_GAN)
    r1: float = setting(0.0, "Weight of the gradient penalty R1.", panel=_GAN)
    r1_every: int = setting(16, "Steps between gradient penalties, which count as much more.", panel=_GAN)
    lecam: float = setting(0.0, "Weight of the LeCam regulariser.", panel=_GAN)

    gradient: str = setting("straight-through", "Past the quantizer: straight-through or rotation.", panel=_CODES)
    codebook_start: str = setting("kmeans", "First codes: kmeans, data (drawn) or random.", panel=_CODES)
    kmeans_batches: int = setting(4, "Batches that k-means looks at.", panel=_CODES)
    revive_every: int = setting(100, "Steps between revivals of dead codes; 0: never.", panel=_CODES)
    revive_below: float = setting(0.02, "A code in a smaller part of these steps is dead.", panel=_CODES)
    revive_until: float = setting(0.8, "Part of the run with revivals; the rest only anneals.", panel=_CODES)


TOKENIZER_PRESETS: dict[str, dict[str, Any]] = {
    "small": {"batch": 16},
    "demo": {},
    "published": dict(
        size=256,
        vocab_size=4096,
        z_channels=32,
        ch=160,
        ch_mult=(1, 1, 2, 2, 4),
        patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        share_quant_resi=4,
        beta=0.25,
    ),
}
"""By name, what differs from the defaults: "demo" is the demo's tokenizer, "small" the same in more and smaller steps,
for a run of minutes, "published" the one of VAR at 256 px."""

_EXPECTED = {
    "1 or more": (lambda x: x >= 1, "size vocab_size z_channels ch batch r1_every kmeans_batches"),
    "0 or more": (
        lambda x: 0 <= x < math.inf,
        "warmup_steps revive_every beta l1 l2 vq weight_decay clip lpips gan gan_start gan_warmup r1 lecam "
        "share_quant_resi quant_resi",
    ),
    "a number above 0": (lambda x: 0 < x < math.inf, "lr disc_lr adaptive_most"),
    "a number from 0 to 1": (lambda x: 0 <= x <= 1, "final_lr revive_below revive_until"),
    "a number from 0 to 1, and below 1": (lambda x: 0 <= x < 1, "ema"),
    "a number from 1 to 16": (lambda x: 1 <= x <= 16, "enlarge"),
    "one or more numbers, each 1 or more": (lambda x: len(x) > 0 and min(x) >= 1, "ch_mult"),
    "growing numbers, each 1 or more": (
        lambda x: len(x) > 0 and min(x) >= 1 and list(x) == sorted(set(x)),
        "patch_nums",
    ),
}
_CHOICES = {
    "precision": PRECISIONS,
    "discriminator": DISCRIMINATORS,
    "gradient": tuple(GRADIENTS),
    "codebook_start": STARTS,
}


def check_tokenizer_settings(settings: TokenizerSettings) -> None:
    """Raises UserError, naming the setting, if one makes no sense."""
    check_values(settings, _EXPECTED, _CHOICES)
    if settings.lpips > 0 and settings.size < LEAST_SIDE:
        raise UserError(f"size: got {settings.size}, expected {LEAST_SIDE} or more with lpips")
    down, side = 2 ** (len(settings.ch_mult) - 1), settings.patch_nums[-1]
    if settings.size != down * side:
        raise UserError(
            f"size: got {settings.size}, expected {down} * {side} = {down * side} "
            f"(down-sampling of ch_mult {settings.ch_mult} times the last of patch_nums)"
        )


def build_tokenizer(settings: TokenizerSettings, *, test_mode: bool) -> VQVAE:
    """The VQVAE that `settings` describe. Raises UserError for settings that describe none."""
    check_tokenizer_settings(settings)
    with user_errors("the tokenizer"):
        vae = VQVAE(
            vocab_size=settings.vocab_size,
            z_channels=settings.z_channels,
            ch=settings.ch,
            beta=settings.beta,
            using_znorm=settings.using_znorm,
            quant_resi=settings.quant_resi,
            share_quant_resi=settings.share_quant_resi,
            v_patch_nums=settings.patch_nums,
            test_mode=test_mode,
            ch_mult=settings.ch_mult,
        )
    vae.quantize.pass_gradient = GRADIENTS[settings.gradient]
    return vae
