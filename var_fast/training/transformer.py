"""Training the transformer (VAR): teacher forcing on the tokens of a frozen tokenizer (VAR section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from var_fast.checkpoint import load_checkpoint, save_checkpoint
from var_fast.errors import UserError
from var_fast.models import VAR, VQVAE
from var_fast.models.no_initialisation import NoInitialisation
from var_fast.training.adam_state import adam_tensors
from var_fast.training.ema import Ema
from var_fast.training.files import weights_hash
from var_fast.training.optimizer import clip_gradients, set_rates, weight_groups
from var_fast.training.order import check_batch, step_seed
from var_fast.training.parallel import gradients_stay, parallelise, whole
from var_fast.training.precision import Precision
from var_fast.training.ranks import Ranks
from var_fast.training.schedule import ProgressiveTraining, lr_factor, weight_decay_at
from var_fast.training.token_sources import TokenBatch, TokenSource
from var_fast.training.transfer import to_device
from var_fast.training.transformer_settings import TransformerSettings, build_transformer

# Tables that are looked up or added, and the gains of AdaLN: not matrices in the sense of weight decay.
_BARE = ("pos_start", "pos_1LC", "lvl_embed", "ada_gss", "scale_mul")


class TeacherForcing(nn.Module):
    """VAR.loss as a forward, which is what DDP, FSDP2 and torch.compile take hold of."""

    def __init__(self, var: VAR) -> None:
        super().__init__()
        self.var = var

    def forward(self, label_B, x_BLC, target_BL, token_weight_BL=None, label_smoothing=0.0):
        return self.var.loss(label_B, x_BLC, target_BL, token_weight_BL, label_smoothing)


class TransformerJob:
    """One transformer in training; run_loop drives it.

    Labels are hidden per image by the seed of the step, not by the model, so that the number of ranks changes nothing.
    """

    kind = "transformer"

    def __init__(
        self,
        settings: TransformerSettings,
        vae: VQVAE,
        source: TokenSource,
        ranks: Ranks | None = None,
        steps: int | None = None,
    ) -> None:
        """vae: frozen, on the ranks' device. steps: the length of the run, which progressive training has to know."""
        self.settings, self.vae, self.source = settings, vae, source
        self.ranks = ranks = ranks or Ranks()
        self.images_per_step, self.steps = settings.batch, steps
        self.skipped: set[str] = source.skipped
        self.classes = source.classes
        self.patch_nums = tuple(vae.quantize.v_patch_nums)
        self.tokenizer_hash = weights_hash(vae)
        _check_parallel(settings, ranks, steps)
        self.progressive = None
        if settings.progressive > 0:
            self.progressive = ProgressiveTraining(
                settings.progressive,
                settings.progressive_first,
                settings.progressive_ramp,
                settings.warmup,
                len(self.patch_nums),
            )
        torch.manual_seed(step_seed(settings.seed, -1))
        self.var = build_transformer(settings, vae, len(self.classes)).to(ranks.device)
        self.var.recompute_blocks = settings.recompute
        self.var.cond_drop_rate = 0.0
        self._initialise()
        forcing = TeacherForcing(self.var)
        if settings.compile:
            forcing.compile()
        self.model = parallelise(forcing, ranks, settings.parallel, self.var.blocks)
        self.ema = self.averaged = None
        if settings.ema > 0:
            average = build_transformer(settings, vae, len(self.classes)).to(ranks.device)
            average.cond_drop_rate = 0.0
            forcing = TeacherForcing(average)
            # DDP would have nothing to do; shards have to lie as the model's do
            self.averaged = parallelise(forcing, ranks, "fsdp", average.blocks) if self._sharded else forcing
            self.ema = Ema(self.var, average, settings.ema)
        self.optimizer = torch.optim.AdamW(
            weight_groups(self.var, settings.weight_decay, bare=_BARE), lr=settings.lr, betas=(0.9, 0.95), fused=True
        )
        self.precision = Precision(settings.precision, ranks.device)
        self.areas_S = torch.tensor([pn * pn for pn in self.patch_nums], dtype=torch.float32, device=ranks.device)
        self.var.train()

    @property
    def _sharded(self) -> bool:
        return self.settings.parallel == "fsdp" and self.ranks.count > 1

    @property
    def average(self) -> VAR:
        """The weights that are evaluated and saved for use."""
        return self.var if self.ema is None else self.ema.average

    def _initialise(self) -> None:
        s = self.settings
        if s.init_from is None:
            self.var.init_weights(
                init_adaln=s.modulation_start,
                init_adaln_gamma=s.gate_start,
                init_head=s.head_start,
                init_std=s.weight_start,
            )
            return
        loaded = load_checkpoint(s.init_from)
        if getattr(loaded, "var", None) is None:
            raise UserError(
                f"init_from: {s.init_from} holds no transformer with its tokenizer, expected a model folder"
            )
        if loaded.var.num_classes != len(self.classes):
            raise UserError(
                f"init_from: {s.init_from} has {loaded.var.num_classes} classes, the data has {len(self.classes)}"
            )
        try:
            self.var.load_state_dict(loaded.var.state_dict())
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise UserError(f"init_from: {s.init_from} has another shape than the settings describe: {first}") from None

    # -------------------------------------------------------------------------------------------------- training
    def start(self) -> None:
        """Nothing: the weights are as they were built."""

    def batches(self, first_step: int) -> Iterator[list[TokenBatch]]:
        """The passes of every step."""
        return self.source.batches(
            first_step, self.ranks, self.settings.batch, self.settings.passes, self.settings.seed
        )

    def step(self, step: int, progress: float, batch: list[TokenBatch]) -> dict[str, torch.Tensor]:
        s = self.settings
        place = min(1.0, progress * self.steps / max(1, self.steps - 1)) if self.steps else progress
        lr = s.lr * lr_factor(self._schedule(), place, s.warmup, s.first_lr, s.last_lr)
        end_decay = s.weight_decay if s.last_weight_decay < 0 else s.last_weight_decay
        set_rates(self.optimizer, lr, weight_decay_at(s.weight_decay, end_decay, place))
        stage = -1 if self.progressive is None else self.progressive.stage(step, self.steps)
        self.var.prog_si = -1 if stage == len(self.patch_nums) - 1 else stage
        sums: dict[str, torch.Tensor] = {}
        try:
            for part, passed in enumerate(batch):
                with gradients_stay(self.model, part < len(batch) - 1):
                    loss, found = self._one_pass(step, part, passed)
                    self.precision.scale(loss / len(batch)).backward()
                for name, value in found.items():
                    sums[name] = sums.get(name, 0) + value / len(batch)
        finally:
            self.var.prog_si = -1
        self.precision.unscale(self.optimizer)
        norm = clip_gradients(self.var.parameters(), s.clip)
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(step)
        device = self.ranks.device
        return {**sums, "grad_norm": self.precision.norm_of_sound_step(norm), "lr": torch.full((), lr, device=device)}

    def _schedule(self) -> str:
        return f"lin{self.settings.progressive:g}" if 0 < self.settings.progressive < 1 else self.settings.schedule

    def _one_pass(self, step: int, part: int, passed: TokenBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one pass, and its numbers for the log."""
        s, device = self.settings, self.ranks.device
        tokens_BL, label_B = self.source.tokens_of(passed, self.vae)
        hidden_B = to_device(self._hidden(step, part, len(label_B)), device)
        label_B = torch.where(hidden_B, self.var.num_classes, label_B)
        scales = len(self.patch_nums) if self.var.prog_si < 0 else self.var.prog_si + 1
        with torch.no_grad():
            x_BLC, tokens_BL = teacher_input(self.vae, tokens_BL, scales)
        weight_BL = self._token_weights(step, tokens_BL)
        with self.precision.autocast():
            loss, loss_k, accuracy_k = self.model(label_B, x_BLC, tokens_BL, weight_BL, s.label_smoothing)
        areas_k = self.areas_S[:scales] / sum(pn * pn for pn in self.patch_nums[:scales])
        accuracy_k = 100.0 * accuracy_k
        missing = torch.full((len(self.patch_nums) - scales,), math.nan, device=device)
        return loss, {
            # In progressive training the loss grows with the scales that are trained: its mean over tokens does not.
            "loss": loss.detach() if self.progressive is None else (loss_k * areas_k).sum(),
            "accuracy_percent": (accuracy_k * areas_k).sum(),
            "loss_tail": loss_k[-1],
            "accuracy_tail_percent": accuracy_k[-1],
            "loss_per_scale": torch.cat([loss_k.float(), missing]),
            "accuracy_percent_per_scale": torch.cat([accuracy_k.float(), missing]),
        }

    def _hidden(self, step: int, part: int, share: int) -> torch.Tensor:
        """(share,) bool: the images of this pass whose label is hidden."""
        s = self.settings
        draw = torch.Generator().manual_seed(step_seed(s.seed ^ 0x1ABE1, step))
        first = (part * self.ranks.count + self.ranks.rank) * share
        return torch.rand(s.batch, generator=draw)[first : first + share] < s.cond_drop

    def _token_weights(self, step: int, tokens_BL: torch.Tensor) -> torch.Tensor | None:
        """(B, L) in progressive training: a token counts 1 / (L of all), one of the newest scale less at first."""
        if self.progressive is None:
            return None
        B, L = tokens_BL.shape
        weight_BL = torch.full((B, L), 1 / self.var.L, device=tokens_BL.device)
        if self.var.prog_si >= 0:
            newest = self.patch_nums[self.var.prog_si] ** 2
            weight_BL[:, L - newest :] *= self.progressive.newest_weight(step, self.steps)
        return weight_BL

    # ------------------------------------------------------------------------------------------------ evaluation
    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out loss (nats) and accuracy (percent), with the label given, of the averaged weights."""
        held_out = self.source.held_out(self.vae, self.ranks)
        if held_out is None:
            return {}
        tokens_ML, label_M = held_out
        scales = len(self.patch_nums)
        sums = torch.zeros(2 * scales + 1, dtype=torch.float64, device=self.ranks.device)
        model = self.model if self.ema is None else self.averaged
        model.eval()
        images, batch, ranks = len(label_M), 64, self.ranks
        for first in range(0, images, batch * ranks.count):
            # Sharded weights want every rank at every pass: one without images repeats some that do not count.
            begin = min(first + batch * ranks.rank, images)
            rows = slice(begin, min(begin + batch, images)) if begin < images else slice(0, 1)
            counted = (rows.stop - rows.start) if begin < images else 0
            tokens_BL = tokens_ML[rows].long().to(ranks.device)
            x_BLC, tokens_BL = teacher_input(self.vae, tokens_BL, scales)
            with self.precision.autocast():
                _, loss_k, accuracy_k = model(label_M[rows].to(ranks.device), x_BLC, tokens_BL)
            sums += counted * torch.cat([loss_k.double(), accuracy_k.double(), sums.new_ones(1)])
        if self._sharded:
            # After a forward without a backward the root would keep its parameters whole, and not see them change.
            model.reshard()
        model.train(model is self.model)
        loss_k, accuracy_k, count = self.ranks.sum_(sums).cpu().split([scales, scales, 1])
        loss_k, accuracy_k = loss_k / count, 100.0 * accuracy_k / count
        areas_k = torch.tensor([pn * pn for pn in self.patch_nums], dtype=torch.float64)
        areas_k /= areas_k.sum()
        return {
            "held_out_loss": float((loss_k * areas_k).sum()),
            "held_out_accuracy_percent": float((accuracy_k * areas_k).sum()),
            "held_out_loss_tail": float(loss_k[-1]),
            "held_out_accuracy_tail_percent": float(accuracy_k[-1]),
            "loss_per_scale": loss_k.tolist(),
            "accuracy_percent_per_scale": accuracy_k.tolist(),
            "images": images,
        }

    def badness(self, metrics: dict[str, Any]) -> float:
        return metrics["held_out_loss"]

    def draw_samples(self, path: Path, step: int) -> None:
        """Sixteen images of the averaged weights, of classes spread over all, always with the same seeds."""
        from var_fast.cli_arguments import spread
        from var_fast.engine import Sampler
        from var_fast.images import make_grid, save_png

        var = self._plain_average(self.ranks.device)
        with self.ranks.together():
            if var is not None:
                training = var.training  # without an average it is the model that learns
                labels = (spread(var.num_classes) * 16)[:16]
                options = {"cfg": 2.0, "top_k": min(900, var.V), "top_p": 0.95}
                try:
                    sampler = Sampler(var.eval(), device=self.ranks.device)
                    images_B3HW = sampler.sample(labels, seeds=list(range(16)), **options)
                finally:
                    var.train(training)
                text = {"label": ",".join(map(str, labels)), "step": str(step), "options": str(options)}
                save_png(make_grid(images_B3HW.float().cpu(), 4), path, text)

    def model_writer(self) -> Callable[[Path], None] | None:
        """Writes both models in float32."""
        var = self._plain_average(torch.device("cpu"))
        return None if var is None else lambda folder: save_checkpoint(folder, self.vae, var, classes=self.classes)

    @torch.no_grad()
    def _plain_average(self, device: torch.device) -> VAR | None:
        """The averaged weights as one module on the main rank, put together from shards if need be."""
        if not self._sharded:
            return self.average if self.ranks.is_main else None
        entries = {}
        for name, tensor in self.average.state_dict().items():
            full = whole(tensor)
            if self.ranks.is_main:
                entries[name] = full.to(device)
        if not self.ranks.is_main:
            return None
        with NoInitialisation():
            var = build_transformer(self.settings, self.vae, len(self.classes))
        var.load_state_dict(entries, assign=True)
        return var.to(device).eval().requires_grad_(False)

    def batch_for_study(self, batch: list[TokenBatch]) -> dict[str, Any]:
        return {f"pass_{part}": passed.tensors() for part, passed in enumerate(batch)}

    # ------------------------------------------------------------------------------------------------- resuming
    def tensors(self) -> dict[str, Any]:
        own = {"model": self.var.state_dict(), "optimizer": adam_tensors(self.var, self.optimizer)}
        return own if self.ema is None else {**own, "ema": self.ema.average.state_dict()}

    def facts(self) -> dict[str, Any]:
        return {
            "classes": self.classes,
            "tokenizer_hash": self.tokenizer_hash,
            "scaler": self.precision.facts(),
            "data": self.source.facts(),
        }

    def set_facts(self, facts: dict[str, Any]) -> None:
        if facts["classes"] != self.classes:
            raise UserError(
                f"data: has {len(self.classes)} classes, the run was trained with {len(facts['classes'])} "
                "or with others; use the data it began with"
            )
        if facts["tokenizer_hash"] != self.tokenizer_hash:
            raise UserError(
                f"tokenizer: this run was trained on the tokens of other weights (hash {facts['tokenizer_hash'][:12]}) "
                f"than this tokenizer's ({self.tokenizer_hash[:12]}); use the tokenizer as it was, or train anew"
            )
        for name, value in self.source.facts().items():
            if facts["data"].get(name) != value:
                theirs = facts["data"].get(name)
                raise UserError(f"data: {name} is {value}, the run began with {theirs}; use the data it began with")
        self.precision.set_facts(facts["scaler"])


def teacher_input(vae: VQVAE, tokens_BL: torch.Tensor, scales: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the transformer is given for scales 1 .. (B, L - 1, Cvae), tokens of the first `scales` scales (B, L))."""
    patch_nums = vae.quantize.v_patch_nums
    per_scale = list(tokens_BL.split([pn * pn for pn in patch_nums], dim=1))
    x_BLC = vae.quantize.idxBl_to_var_input(per_scale)
    tokens_BL = torch.cat(per_scale[:scales], dim=1)
    return x_BLC[:, : tokens_BL.shape[1] - patch_nums[0] ** 2], tokens_BL


def _check_parallel(settings: TransformerSettings, ranks: Ranks, steps: int | None) -> None:
    check_batch(settings.batch, ranks, settings.passes)
    if settings.parallel == "fsdp" and settings.precision == "float16":
        raise UserError("precision: got float16 with parallel fsdp, expected bfloat16 or float32 there")
    if settings.progressive > 0 and steps is None:
        raise UserError("progressive: needs a run whose length is known, expected --steps or --epochs")
