"""Training the multi-scale tokenizer (VQVAE): reconstruction, codebook and commitment loss, revival of dead codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from var_fast.errors import UserError
from var_fast.models import VQVAE
from var_fast.training.augment import random_flip, shift_zoom
from var_fast.training.checks import check_settings, user_errors
from var_fast.training.codebook import code_rows_used, revive_codes
from var_fast.training.ema import Ema
from var_fast.training.emoji import EmojiSet, load_emoji, to_float
from var_fast.training.files import contents_of, load_state
from var_fast.training.loop import Cadence, Outcome, batch_indices, run_loop, step_seed
from var_fast.training.metrics import tokenizer_metrics
from var_fast.training.schedule import Limits, lr_factor


@dataclass(frozen=True)
class TokenizerSettings:
    """What a tokenizer run is made of; the defaults are the demo's. A resumed run must have the same."""

    size: int = 32
    vocab_size: int = 2048
    z_channels: int = 16
    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 2, 2)
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
    beta: float = 0.25
    batch: int = 32
    lr: float = 1e-3
    final_lr: float = 0.02  # of lr
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    l1: float = 1.0
    l2: float = 1.0
    vq: float = 1.0
    ema: float = 0.995
    revive_every: int = 100  # steps; 0: never
    revive_below: float = 0.02  # a code used in a smaller part of the window's steps is dead
    revive_until: float = 0.8  # of the run: the last part only anneals
    flip: bool = True
    zoom: float = 0.0  # probability that a batch is scaled and shifted
    channels_last: bool = True
    skin_variants: int = 2
    seed: int = 0


def build_tokenizer(settings: TokenizerSettings, *, test_mode: bool) -> VQVAE:
    """The VQVAE that `settings` describe. Raises UserError for settings that describe none."""
    check_settings(settings)
    down = 2 ** (len(settings.ch_mult) - 1)
    side = settings.patch_nums[-1]
    if settings.size != down * side:
        raise UserError(
            f"size: got {settings.size}, expected {down} * {side} = {down * side} "
            f"(down-sampling of ch_mult {settings.ch_mult} times the last of patch_nums)"
        )
    with user_errors("the tokenizer"):
        return VQVAE(
            vocab_size=settings.vocab_size,
            z_channels=settings.z_channels,
            ch=settings.ch,
            beta=settings.beta,
            v_patch_nums=settings.patch_nums,
            test_mode=test_mode,
            ch_mult=settings.ch_mult,
        )


def weight_groups(model: nn.Module, weight_decay: float, bare: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """AdamW groups: decay on matrices and kernels; none on vectors, nor on names that contain a word of `bare`."""
    decayed, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (others if p.ndim < 2 or any(word in name for word in bare) else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
    """Scales the gradients down to a norm of at most `limit` and returns their norm. Raises UserError where it is not
    finite: the step must not be applied, or the weights, and the next checkpoint, would be lost."""
    try:
        return nn.utils.clip_grad_norm_(model.parameters(), limit, error_if_nonfinite=True)
    except RuntimeError as error:
        raise UserError("the gradient is not finite any more; the last checkpoint is intact: try a lower lr") from error


class TokenizerJob:
    """One tokenizer in training; run_loop drives it."""

    kind = "tokenizer"

    def __init__(
        self, settings: TokenizerSettings, data: EmojiSet, source_u8: torch.Tensor, device: str = "cpu"
    ) -> None:
        """data: pictures of the trained size. source_u8: the same pictures, as large as there are, for zooming."""
        self.settings = settings
        self.images_per_step = settings.batch
        train = ~data.held_out
        self.train_u8, self.held_out_u8 = data.images_u8[train], data.images_u8[data.held_out]
        self.source_u8 = source_u8[train]
        torch.manual_seed(step_seed(settings.seed, -1))
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.vae = build_tokenizer(settings, test_mode=False).to(device).to(memory_format=layout)
        average = build_tokenizer(settings, test_mode=True).to(device).to(memory_format=layout)
        self.device, self.layout = device, layout
        self.ema = Ema(self.vae, average, settings.ema)
        self.optimizer = torch.optim.AdamW(
            weight_groups(self.vae, settings.weight_decay, bare=("embedding",)), lr=settings.lr, betas=(0.9, 0.99)
        )
        self.steps_used_V = torch.zeros(settings.vocab_size, dtype=torch.int64, device=device)
        self.steps_watched = 0
        self.use_percent = 0.0
        self.vae.train()

    def batch(self, step: int) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1]: the pictures of this step, flipped, and scaled now and then."""
        s = self.settings
        rows = batch_indices(len(self.train_u8), s.batch, step, s.seed)
        draw = torch.Generator().manual_seed(step_seed(s.seed, step))
        if float(torch.rand((), generator=draw)) < s.zoom:
            img = shift_zoom(to_float(self.source_u8[rows]), s.size, draw)
        else:
            img = to_float(self.train_u8[rows])
        if s.flip:
            img = random_flip(img, draw)
        return img.to(self.device, memory_format=self.layout)

    def step(self, step: int, progress: float) -> dict[str, torch.Tensor]:
        s = self.settings
        img = self.batch(step)
        if step == 0:
            # A data-made start: with every code at zero, all vectors are badly served and all codes are dead.
            nn.init.zeros_(self.vae.quantize.embedding.weight)
            revive_codes(self.vae, torch.ones_like(self.steps_used_V, dtype=torch.bool), img, average=self.ema.average)
        lr = s.lr * lr_factor(step, progress, warmup_steps=s.warmup_steps, final=s.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        recon, _, vq_loss = self.vae(img)
        difference = recon - img
        l1, l2 = difference.abs().mean(), difference.square().mean()
        loss = s.l1 * l1 + s.l2 * l2 + s.vq * vq_loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.steps_used_V += code_rows_used(self.vae.quantize.embedding.weight.grad)
        self.steps_watched += 1
        norm = clip_gradients(self.vae, s.clip)
        self.optimizer.step()
        self.ema.update(step)
        self._revive(step, progress, img)
        psnr = -10.0 * torch.log10(l2.detach() / 4.0)
        return {
            "loss": loss.detach(),
            "l1": l1.detach(),
            "psnr_db": psnr,
            "vq_loss": vq_loss.detach(),
            "grad_norm": norm.detach(),
            "code_use_percent": torch.tensor(self.use_percent),
            "lr": torch.tensor(lr),
        }

    def _revive(self, step: int, progress: float, img: torch.Tensor) -> None:
        """At the end of a window, move dead codes; windows are short at first, when the encoder moves fast."""
        s = self.settings
        window = min(s.revive_every, 20) if step < 2 * s.revive_every else s.revive_every
        if not window or self.steps_watched < window:
            return
        self.use_percent = 100.0 * float((self.steps_used_V > 0).float().mean())
        if progress < s.revive_until:
            dead_V = self.steps_used_V <= s.revive_below * self.steps_watched
            revive_codes(self.vae, dead_V, img, optimizer=self.optimizer, average=self.ema.average)
        self.steps_used_V.zero_()
        self.steps_watched = 0

    def evaluate(self) -> dict[str, Any]:
        """Held-out PSNR and code use of the averaged weights."""
        held_out = {f"held_out_{k}": v for k, v in tokenizer_metrics(self.ema.average, self.held_out_u8).items()}
        return {**held_out, "window_code_use_percent": self.use_percent}

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.vae.state_dict(),
            "ema": self.ema.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps_used_V": self.steps_used_V,
            "steps_watched": self.steps_watched,
            "use_percent": self.use_percent,
            "record_hit": self.vae.quantize.record_hit,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["model"])
        self.ema.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_used_V.copy_(state["steps_used_V"])
        self.steps_watched, self.use_percent = state["steps_watched"], state["use_percent"]
        # How far the running code-use statistics have settled; a plain number of the quantizer, in no state dict.
        self.vae.quantize.record_hit = state.get("record_hit", 0)


def train_tokenizer(
    data: str | Path,
    out: str | Path,
    limits: Limits,
    settings: TokenizerSettings | None = None,
    *,
    device: str = "cpu",
    cadence: Cadence | None = None,
    restart: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Train a tokenizer on the emoji in folder `data`; out/checkpoint.pt holds everything to go on or to export.

    Subcategories too small to be a class of the transformer are trained on too. Raises UserError on bad settings,
    missing data, or a loss that is no number any more.
    """
    settings = settings or TokenizerSettings()
    build_tokenizer(settings, test_mode=True)  # bad settings fail before the pictures are read
    console = console or Console()
    keep = {"skin_variants": settings.skin_variants, "min_per_class": 1}
    pictures = load_emoji(data, settings.size, **keep)
    larger = min(64, 2 * settings.size)
    source = pictures if larger == settings.size else load_emoji(data, larger, **keep)
    job = TokenizerJob(settings, pictures, source.images_u8, device)
    console.print(
        f"{len(job.train_u8)} training and {len(job.held_out_u8)} held-out pictures; "
        f"{sum(p.numel() for p in job.vae.parameters()) / 1e6:.2f} M parameters",
        soft_wrap=True,
        highlight=False,
    )
    return run_loop(job, out, limits, cadence=cadence, restart=restart, console=console)


def load_trained_tokenizer(path: str | Path, device: str = "cpu") -> tuple[VQVAE, TokenizerSettings]:
    """The averaged tokenizer of a training checkpoint, frozen and in eval mode, and its settings.

    Raises UserError if the file is none or holds other entries.
    """
    state = load_state(path, "tokenizer")
    with contents_of(path):
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in state["settings"].items()}
        settings = TokenizerSettings(**plain)
        vae = build_tokenizer(settings, test_mode=True)
        vae.load_state_dict(state["job"]["ema"])
    return vae.eval().requires_grad_(False).to(device), settings
