"""Training the transformer (VAR): teacher forcing on the tokens of a frozen tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from var_fast.errors import UserError
from var_fast.models import VAR, VQVAE
from var_fast.training.augment import shift_zoom
from var_fast.training.checks import check_settings, user_errors
from var_fast.training.ema import Ema
from var_fast.training.emoji import EmojiSet, load_emoji, to_float
from var_fast.training.files import contents_of, load_state, save_state, weights_hash
from var_fast.training.loop import Cadence, Outcome, batch_indices, run_loop, step_seed
from var_fast.training.metrics import split_scales, tokenise, transformer_metrics, unigram_baseline
from var_fast.training.schedule import Limits, lr_factor
from var_fast.training.tokenizer import clip_gradients, load_trained_tokenizer, weight_groups

# Tables that are looked up or added, and the gains of AdaLN: not matrices in the sense of weight decay.
_BARE = ("class_emb", "pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul")


@dataclass(frozen=True)
class TransformerSettings:
    """What a transformer run is made of; the defaults are the demo's. A resumed run must have the same."""

    depth: int = 6
    embed_dim: int = 256
    num_heads: int = 4
    mlp_ratio: float = 4.0
    attn_l2_norm: bool = True
    shared_aln: bool = False
    cond_drop_rate: float = 0.1
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    batch: int = 16
    lr: float = 1e-3
    final_lr: float = 0.02  # of lr
    warmup_steps: int = 200
    schedule: str = "cosine"
    hold: float = 0.5  # of the run at the peak, for the "linear" schedule
    weight_decay: float = 0.05
    clip: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.998
    views: int = 2  # plain, mirrored, then shifted and scaled ones, mirrored and not in turn
    flip: bool = True
    skin_variants: int = 2
    min_per_class: int = 8
    tokenizer: str = field(default="", compare=False)  # where its checkpoint is; which it is, a hash of it tells
    seed: int = 0


def build_transformer(settings: TransformerSettings, vae: VQVAE, num_classes: int) -> VAR:
    """The VAR that `settings` describe, on `vae`. Raises UserError for settings that describe none."""
    check_settings(settings)
    with user_errors("the transformer"):
        return VAR(
            vae_local=vae,
            num_classes=num_classes,
            depth=settings.depth,
            embed_dim=settings.embed_dim,
            num_heads=settings.num_heads,
            mlp_ratio=settings.mlp_ratio,
            drop_rate=settings.drop_rate,
            drop_path_rate=settings.drop_path_rate,
            shared_aln=settings.shared_aln,
            cond_drop_rate=settings.cond_drop_rate,
            attn_l2_norm=settings.attn_l2_norm,
            patch_nums=tuple(vae.quantize.v_patch_nums),
        )


def view_batches(
    images_u8: torch.Tensor, source_u8: torch.Tensor, view: int, flip: bool, seed: int, batch: int = 64
) -> Iterator[torch.Tensor]:
    """All pictures, in [-1, 1], in one of their views.

    View 0 is the picture itself. Odd views are mirrored if `flip`. Views other than 0 (and, with `flip`, other than
    1) are shifted and scaled a little, differently for each view and batch. source_u8: the same pictures, larger.
    """
    plain = view < (2 if flip else 1)
    for number, (img_u8, src_u8) in enumerate(zip(images_u8.split(batch), source_u8.split(batch), strict=True)):
        if plain:
            img = to_float(img_u8)
        else:
            draw = torch.Generator().manual_seed(step_seed(seed, 1_000_000 * view + number))
            img = shift_zoom(to_float(src_u8), img_u8.shape[-1], draw, zoom=(0.92, 1.08), shift=1)
        yield img.flip(-1) if flip and view % 2 else img


class TransformerJob:
    """One transformer in training; run_loop drives it. All tokens are made once, here, and kept in memory."""

    kind = "transformer"

    def __init__(
        self,
        settings: TransformerSettings,
        vae: VQVAE,
        data: EmojiSet,
        source_u8: torch.Tensor,
        device: str = "cpu",
        best_path: Path | None = None,
    ) -> None:
        """vae: frozen, on `device`. best_path: where the weights with the lowest held-out loss are kept."""
        self.settings = settings
        self.images_per_step = settings.batch
        self.vae, self.classes, self.device, self.best_path = vae, data.classes, device, best_path
        self.patch_nums = tuple(vae.quantize.v_patch_nums)
        self.tokenizer_hash = weights_hash(vae)
        train = ~data.held_out
        images, source = data.images_u8[train], source_u8[train]
        self.tokens_NL = torch.cat(
            [
                tokenise(vae, view_batches(images, source, view, settings.flip, settings.seed))
                for view in range(settings.views)
            ]
        )
        self.labels_N = data.labels[train].repeat(settings.views)
        self.held_tokens_ML = tokenise(vae, (to_float(chunk) for chunk in data.images_u8[data.held_out].split(64)))
        self.held_labels_M = data.labels[data.held_out]
        self.unigram = unigram_baseline(self.tokens_NL, self.held_tokens_ML, self.patch_nums, vae.vocab_size)
        torch.manual_seed(step_seed(settings.seed, -1))
        self.var = build_transformer(settings, vae, len(data.classes)).to(device)
        self.var.init_weights(init_std=-1, init_adaln_gamma=1e-3)  # as the published recipes for small depths
        average = build_transformer(settings, vae, len(data.classes)).to(device)
        self.ema = Ema(self.var, average, settings.ema)
        self.optimizer = torch.optim.AdamW(
            weight_groups(self.var, settings.weight_decay, bare=_BARE), lr=settings.lr, betas=(0.9, 0.95)
        )
        self.best_loss = float("inf")
        self.var.train()

    def step(self, step: int, progress: float) -> dict[str, torch.Tensor]:
        s = self.settings
        rows = batch_indices(len(self.tokens_NL), s.batch, step, s.seed)
        tokens_BL = self.tokens_NL[rows].long().to(self.device)
        with torch.no_grad():
            x_BLC = self.vae.quantize.idxBl_to_var_input(split_scales(tokens_BL, self.patch_nums))
        lr = s.lr * lr_factor(
            step, progress, warmup_steps=s.warmup_steps, shape=s.schedule, final=s.final_lr, hold=s.hold
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        label_B = self.labels_N[rows].to(self.device)
        loss, _, accuracy_k = self.var.loss(label_B, x_BLC, tokens_BL, label_smoothing=s.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_gradients(self.var, s.clip)
        self.optimizer.step()
        self.ema.update(step)
        return {
            "loss": loss.detach(),
            "accuracy_percent": 100.0 * self._mean(accuracy_k),
            "grad_norm": norm.detach(),
            "lr": torch.tensor(lr),
        }

    def evaluate(self) -> dict[str, Any]:
        """Held-out loss (nats) and accuracy (percent) of the averaged weights and of the unigram baseline."""
        ours = transformer_metrics(self.ema.average, self.vae, self.held_tokens_ML, self.held_labels_M)
        loss, accuracy = (self._mean(ours[k]) for k in ("loss", "accuracy_percent"))
        if loss < self.best_loss:
            self.best_loss = loss
            if self.best_path is not None:
                weights = self.ema.average.state_dict()
                state = {"kind": "best transformer", "weights": weights, "tokenizer_hash": self.tokenizer_hash}
                save_state(self.best_path, state)
        return {
            "held_out_loss": loss,
            "held_out_unigram_loss": self._mean(self.unigram["loss"]),
            "held_out_accuracy_percent": accuracy,
            "held_out_unigram_accuracy_percent": self._mean(self.unigram["accuracy_percent"]),
            "best_held_out_loss": self.best_loss,
            "per_scale": ours,
            "unigram_per_scale": self.unigram,
        }

    def _mean(self, per_scale: list[float] | torch.Tensor) -> float | torch.Tensor:
        """Over tokens, so that a scale counts by its area."""
        areas = [pn * pn for pn in self.patch_nums]
        return sum(a * v for a, v in zip(areas, per_scale, strict=True)) / sum(areas)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.var.state_dict(),
            "ema": self.ema.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "classes": self.classes,
            "best_loss": self.best_loss,
            "tokenizer_hash": self.tokenizer_hash,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["classes"] != self.classes:
            raise UserError("data: its classes are not those the checkpoint was trained with; use the same data folder")
        _require_tokenizer(state, self.tokenizer_hash, "this run")
        self.var.load_state_dict(state["model"])
        self.ema.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_loss = state["best_loss"]


def _require_tokenizer(state: dict[str, Any], tokenizer_hash: str, what: str) -> None:
    """Raises UserError if `state` was made on another tokenizer; older checkpoints do not say, and are taken."""
    theirs = state.get("tokenizer_hash", tokenizer_hash)
    if theirs != tokenizer_hash:
        raise UserError(
            f"tokenizer: {what} was trained on the tokens of other weights (hash {theirs[:12]}) than this "
            f"tokenizer's ({tokenizer_hash[:12]}); use the tokenizer as it was, or train anew"
        )


def load_pictures(data: str | Path, settings: TransformerSettings, size: int) -> tuple[EmojiSet, torch.Tensor]:
    """The emoji at `size` pixels, with classes, and the same pictures up to twice as large."""
    keep = {"skin_variants": settings.skin_variants, "min_per_class": settings.min_per_class}
    pictures = load_emoji(data, size, **keep)
    larger = min(64, 2 * size)
    return pictures, pictures.images_u8 if larger <= size else load_emoji(data, larger, **keep).images_u8


def train_transformer(
    data: str | Path,
    out: str | Path,
    limits: Limits,
    settings: TransformerSettings,
    *,
    device: str = "cpu",
    cadence: Cadence | None = None,
    restart: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Train a transformer on the emoji in folder `data`, with the tokenizer of checkpoint `settings.tokenizer`.

    Leaves out/checkpoint.pt, out/best.pt (averaged weights at the lowest held-out loss) and out/log.jsonl.
    Raises UserError on bad settings, missing data, or a loss that is no number any more.
    """
    check_settings(settings)  # bad settings fail before the long part
    console = console or Console()
    vae, tokenizer_settings = load_trained_tokenizer(settings.tokenizer, device)
    pictures, source_u8 = load_pictures(data, settings, tokenizer_settings.size)
    if pictures.dropped:
        listed = ", ".join(f"{name} ({n})" for name, n in pictures.dropped.items())
        console.print(
            f"left out, fewer than {settings.min_per_class} pictures: {listed}", soft_wrap=True, highlight=False
        )
    console.print(
        f"tokenising {settings.views} views of {len(pictures.images_u8)} pictures ...", soft_wrap=True, highlight=False
    )
    job = TransformerJob(settings, vae, pictures, source_u8, device, Path(out) / "best.pt")
    console.print(
        f"{len(pictures.classes)} classes, {len(job.tokens_NL)} token sequences, {len(job.held_tokens_ML)} held out; "
        f"{sum(p.numel() for p in job.var.parameters()) / 1e6:.2f} M parameters",
        soft_wrap=True,
        highlight=False,
    )
    return run_loop(job, out, limits, cadence=cadence, restart=restart, console=console)


def load_trained_transformer(
    path: str | Path, vae: VQVAE, *, best: str | Path | None = None
) -> tuple[VAR, list[str], TransformerSettings]:
    """The averaged transformer of a training checkpoint, frozen, in eval mode; its class names and settings.

    best: take the weights from this file (out/best.pt) instead of the last ones. Raises UserError if a file is none,
    holds other entries, or was made on another tokenizer than `vae`.
    """
    state, tokenizer_hash = load_state(path, "transformer"), weights_hash(vae)
    with contents_of(path):
        settings = TransformerSettings(**state["settings"])
        classes, weights = state["job"]["classes"], state["job"]["ema"]
        _require_tokenizer(state["job"], tokenizer_hash, str(path))
        var = build_transformer(settings, vae, len(classes))
    with contents_of(best or path):
        if best:
            state = load_state(best, "best transformer")
            weights = state["weights"]
            _require_tokenizer(state, tokenizer_hash, str(best))
        var.load_state_dict(weights)
    return var.eval().requires_grad_(False), classes, settings
