"""What a transformer run is made of: settings, their checks, and the model they describe."""

from __future__ import annotations

import math
from dataclasses import dataclass

from var_fast.errors import UserError
from var_fast.models import VAR, VQVAE
from var_fast.training.checks import check_values, user_errors
from var_fast.training.parallel import STRATEGIES
from var_fast.training.precision import PRECISIONS
from var_fast.training.schedule import lr_factor
from var_fast.training.settings import setting

MODEL, LEARNING, REGULAR, START, PROGRESS, MACHINE = (
    "Model",
    "Learning rate and weight decay",
    "Regularisation",
    "Initial weights",
    "Progressive training",
    "Precision and memory",
)


@dataclass(frozen=True)
class TransformerSettings:
    """What a transformer run is made of; the defaults are the preset "demo". A resumed run must have the same."""

    depth: int = setting(6, "Blocks.", panel=MODEL)
    embed_dim: int = setting(256, "Width; 0: 64 times the depth.", panel=MODEL)
    num_heads: int = setting(4, "Heads; 0: as many as blocks.", panel=MODEL)
    mlp_ratio: float = setting(4.0, "Width of the FFN, in widths of the model.", panel=MODEL)
    attn_l2_norm: bool = setting(True, "L2-normalised queries and keys.", panel=MODEL)
    shared_aln: bool = setting(False, "One AdaLN projection for all blocks.", panel=MODEL)
    batch: int = setting(16, "Images per step, of all ranks and passes together.", panel=LEARNING)
    base_lr: float = setting(1.6e-2, "Peak learning rate per 256 images of the batch.", panel=LEARNING)
    schedule: str = setting("cos", "cos, lin, lin0, lin00, linT (T a number below 1) or exp.", panel=LEARNING)
    warmup: float = setting(0.02, "Part of the run in which the learning rate grows.", panel=LEARNING)
    first_lr: float = setting(0.005, "Learning rate of the first step, of the peak's.", panel=LEARNING)
    last_lr: float = setting(0.02, "Learning rate of the last step, of the peak's.", panel=LEARNING)
    weight_decay: float = setting(0.05, "AdamW's weight decay at the start.", panel=LEARNING)
    last_weight_decay: float = setting(-1.0, "Weight decay at the end (half a cosine); -1: the same.", panel=LEARNING)
    clip: float = setting(1.0, "Largest norm of the gradients; 0: any.", panel=LEARNING)
    label_smoothing: float = setting(0.0, "Of the cross-entropy.", panel=REGULAR)
    cond_drop: float = setting(0.1, "How often the label is hidden, for guidance.", panel=REGULAR)
    drop_rate: float = setting(0.0, "Dropout in attention output and FFN.", panel=REGULAR)
    drop_path: float = setting(0.0, "Largest rate of stochastic depth; -1: depth / 240.", panel=REGULAR)
    ema: float = setting(0.998, "Decay of the averaged weights, which are saved for use; 0: none.", panel=REGULAR)
    weight_start: float = setting(-1.0, "Deviation of initial weights (ini); -1: sqrt(1 / (3 width)).", panel=START)
    head_start: float = setting(0.02, "Factor on the head's initial weights (hd).", panel=START)
    modulation_start: float = setting(0.5, "Factor on the modulation's (aln).", panel=START)
    gate_start: float = setting(1e-3, "Factor on the gates' (alng).", panel=START)
    init_from: str | None = setting(None, "Begin with the weights of this model folder.", compare=False, panel=START)
    progressive: float = setting(0.0, "Part of the run in which scales are added (pg); 0: all at once.", panel=PROGRESS)
    progressive_first: int = setting(4, "Last scale trained at the start, from 0 (pg0).", panel=PROGRESS)
    progressive_ramp: float = setting(
        1 / 300, "Part of the run in which a new scale's loss grows in (pgwp).", panel=PROGRESS
    )
    precision: str = setting("float32", "float32, bfloat16 or float16 (autocast, as published).", panel=MACHINE)
    passes: int = setting(1, "Passes that a step's batch is divided into (gradient accumulation).", panel=MACHINE)
    recompute: bool = setting(
        False, "Activation checkpointing: less memory, a third more work.", compare=False, panel=MACHINE
    )
    compile: bool = setting(False, "torch.compile of the model.", compare=False, panel=MACHINE)
    parallel: str = setting("ddp", "On several ranks: ddp, or fsdp (sharded weights).", compare=False, panel=MACHINE)
    seed: int = setting(0, "Everything random follows from it.")

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.base_lr * self.batch / 256


_EXPECTED = {
    "1 or more": (lambda x: x >= 1, "depth batch passes"),
    "0 or more": (lambda x: 0 <= x < math.inf, "embed_dim num_heads weight_decay clip progressive_first"),
    "a number above 0": (lambda x: 0 < x < math.inf, "mlp_ratio base_lr"),
    "a number above 0 and up to 1": (lambda x: 0 < x <= 1, "first_lr last_lr progressive_ramp"),
    "a number from 0 to 1": (lambda x: 0 <= x <= 1, "label_smoothing cond_drop"),
    "0, or a number from 0.01 to 1": (lambda x: x == 0 or 0.01 <= x <= 1, "progressive"),
    "a number from 0 to 1, and below 1": (lambda x: 0 <= x < 1, "ema drop_rate warmup"),
    "a finite number, 0 or more": (lambda x: 0 <= x < math.inf, "head_start modulation_start gate_start"),
    "-1 or a number from 0 to 1, and below 1": (lambda x: x == -1 or 0 <= x < 1, "drop_path"),
    "-1 or 0 or more": (lambda x: x == -1 or 0 <= x < math.inf, "last_weight_decay weight_start"),
}
_CHOICES = {"precision": tuple(PRECISIONS), "parallel": STRATEGIES}


def check_transformer_settings(settings: TransformerSettings) -> None:
    """Raises UserError, naming the setting, if one makes no sense."""
    check_values(settings, _EXPECTED, _CHOICES)
    lr_factor(settings.schedule, 0.5, 0.0, 1.0, 1.0)
    width, heads = settings.embed_dim or 64 * settings.depth, settings.num_heads or settings.depth
    if width % heads:
        raise UserError(f"embed_dim: got {width}, expected a multiple of num_heads = {heads}")


def build_transformer(settings: TransformerSettings, vae: VQVAE, num_classes: int) -> VAR:
    """The VAR that `settings` describe, on `vae`, not initialised. Raises UserError for settings that describe none."""
    check_transformer_settings(settings)
    heads = settings.num_heads or settings.depth
    with user_errors("the transformer"):
        return VAR(
            vae_local=vae,
            num_classes=num_classes,
            depth=settings.depth,
            embed_dim=settings.embed_dim or 64 * settings.depth,
            num_heads=heads,
            mlp_ratio=settings.mlp_ratio,
            drop_rate=settings.drop_rate,
            drop_path_rate=0.1 * settings.depth / 24 if settings.drop_path < 0 else settings.drop_path,
            shared_aln=settings.shared_aln,
            cond_drop_rate=settings.cond_drop,
            attn_l2_norm=settings.attn_l2_norm,
            patch_nums=tuple(vae.quantize.v_patch_nums),
        )
