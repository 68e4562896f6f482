"""Training the multi-scale tokenizer (VQVAE; VAR section 3.1): reconstruction, codebook, perceptual and adversarial
losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from var_fast.checkpoint import save_checkpoint
from var_fast.errors import UserError
from var_fast.images import make_grid, save_png
from var_fast.models import VQVAE
from var_fast.ops.multiscale_quantize import scale_position
from var_fast.training.adam_state import adam_tensors
from var_fast.training.adversary import LOGGED, build_adversary
from var_fast.training.adversary.balance import adaptive_weight, last_layer_gradients
from var_fast.training.code_use import CodeUse
from var_fast.training.codebook import revive_codes, start_codebook
from var_fast.training.data import Augmentation, Batch, ImageSource, TrainBatches, evaluation_batches, to_float
from var_fast.training.ema import Ema
from var_fast.training.files import weights_hash
from var_fast.training.lpips import load_lpips
from var_fast.training.optimizer import clip_and_step, set_rates, weight_groups
from var_fast.training.order import check_batch, step_seed
from var_fast.training.parallel import parallelise
from var_fast.training.ranks import Ranks
from var_fast.training.schedule import cosine_factor
from var_fast.training.tokenizer_settings import TokenizerSettings, build_tokenizer
from var_fast.training.transfer import to_device

SAMPLES = 16  # pictures in a sample sheet
REPORT_EVERY = 100  # steps of a window of code use, where codes are not revived


class TokenizerJob:
    """One tokenizer in training; the loop drives it."""

    kind = "tokenizer"

    def __init__(
        self,
        settings: TokenizerSettings,
        train: ImageSource,
        val: ImageSource | None,
        ranks: Ranks | None = None,
        *,
        workers: int = 0,
        val_images: int | None = None,
    ) -> None:
        """val: held-out pictures to evaluate on, if any, `val_images` of them at most. workers: processes that decode
        pictures, for each rank.

        Raises UserError for settings that make no sense, and for weight files that are missing or of another kind.
        """
        self.settings, self.train, self.val = settings, train, val
        self.ranks = ranks = ranks or Ranks()
        check_batch(settings.batch, ranks, parts=1)
        self.workers, self.val_images = workers, val_images
        self._images_hash = train.fingerprint()
        self.skipped: set[str] = set()
        self.images_per_step = settings.batch
        s, device = settings, ranks.device
        self.augmentation = Augmentation(s.size, enlarge=s.enlarge, flip=s.flip)
        self.layout = torch.channels_last if s.channels_last else torch.contiguous_format
        torch.manual_seed(step_seed(s.seed, -1))
        self.vae = build_tokenizer(s, test_mode=False).to(device).to(memory_format=self.layout).train()
        _freeze_unused_phi(self.vae)
        average = build_tokenizer(s, test_mode=True).to(device).to(memory_format=self.layout)
        self.ema = Ema(self.vae, average, s.ema)
        groups = weight_groups(self.vae, s.weight_decay, bare=("embedding",))
        self.optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.99), fused=True)
        self.model = parallelise(self.vae, ranks)
        self.lpips = load_lpips(s.lpips_weights, s.vgg_weights).to(device) if s.lpips > 0 else None
        self.adversary = build_adversary(
            s.discriminator,
            ranks,
            size=s.size,
            dino_weights=s.dino_weights,
            lr=s.disc_lr,
            clip=s.clip,
            r1=s.r1,
            r1_every=s.r1_every,
            lecam=s.lecam,
        )
        self.code_use = CodeUse(len(s.patch_nums), s.vocab_size, device)
        judges = {"lpips": self.lpips, "features": self.adversary.features if self.adversary else None}
        self._hashes = {f"{name}_hash": judge and weights_hash(judge) for name, judge in judges.items()}

    def start(self) -> None:
        """The first codes of a fresh run, and of its average. Collective."""
        s = self.settings
        batches = (self._images(batch) for batch in islice(self.batches(0), s.kmeans_batches))
        start_codebook(self.vae, s.codebook_start, batches, step_seed(s.seed, -1), self.ranks)
        self.ema.average.quantize.embedding.weight.copy_(self.vae.quantize.embedding.weight.detach())

    def batches(self, first_step: int) -> Iterator[Batch]:
        """This rank's share of every step from there on."""
        s = self.settings
        batches = TrainBatches(
            self.train,
            self.augmentation,
            batch=s.batch,
            seed=s.seed,
            ranks=self.ranks,
            first_step=first_step,
            workers=self.workers,
        )
        for batch in batches:
            self.skipped.update(batch.skipped)
            yield batch

    def step(self, step: int, progress: float, batch: Batch) -> dict[str, torch.Tensor]:
        """One step of learning; scalars on the device, means over this rank's share.

        The losses are differentiated to the reconstruction first, each once; what they add up to there goes on
        through the model.
        """
        s = self.settings
        img = self._images(batch)
        rate = cosine_factor(step, progress, s.warmup_steps, s.final_lr)
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=s.precision == "bfloat16"):
            recon, _, vq_loss = self.model(img)
        recon = recon.float()
        fake = recon.detach().requires_grad_()
        loss, metrics = self._reconstruction_loss(fake, img)
        (grad,) = torch.autograd.grad(loss, fake)
        if self.adversary is not None:
            adversarial, found = self._adversarial_gradient(step, recon, fake, grad)
            grad = grad if adversarial is None else grad + adversarial
            metrics |= found
        torch.autograd.backward([recon, vq_loss], [grad, torch.full_like(vq_loss, s.vq)])
        set_rates(self.optimizer, s.lr * rate)
        norm = clip_and_step(self.optimizer, self.vae.parameters(), s.clip)
        self.ema.update(step)
        self.code_use.add(self.vae.quantize.hit_SV)
        if self.adversary is not None:
            metrics |= self._teach_adversary(step, img, fake, s.disc_lr * rate)
        self._revive(step, progress, img)
        return {
            "loss": (loss + s.vq * vq_loss).detach(),
            **metrics,
            "vq_loss": vq_loss.detach(),
            "grad_norm": norm.detach(),
            "code_use_percent": self.code_use.percent(),
            "lr": self._scalar(s.lr * rate),
        }

    def _images(self, batch: Batch) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1], on the device, in the layout of the model."""
        images_u8 = to_device(batch.images_u8, self.ranks.device)
        return to_float(images_u8).contiguous(memory_format=self.layout)

    def _scalar(self, value: float) -> torch.Tensor:
        """On the device, without a copy that the CPU would wait for."""
        return torch.full((), value, device=self.ranks.device)

    def _reconstruction_loss(self, fake, img) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        s = self.settings
        difference = fake - img
        l1, l2 = difference.abs().mean(), difference.square().mean()
        loss = s.l1 * l1 + s.l2 * l2
        metrics = {"l1": l1.detach(), "psnr_db": -10.0 * torch.log10(l2.detach() / 4.0)}
        if self.lpips is not None:
            perceptual = self.lpips(fake, img).mean()
            loss = loss + s.lpips * perceptual
            metrics["lpips"] = perceptual.detach()
        return loss, metrics

    def _adversarial_gradient(self, step, recon, fake, grad) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """What the discriminator adds to the gradient at the reconstruction; None before it starts."""
        s = self.settings
        if step < s.gan_start:
            return None, {"gan_loss": self._scalar(0.0), "gan_weight": self._scalar(0.0)}
        loss = self.adversary.generator_loss(fake)
        (adversarial,) = torch.autograd.grad(loss, fake)
        weight = self._scalar(s.gan * min(1.0, (step - s.gan_start + 1) / max(1, s.gan_warmup)))
        if s.adaptive_weight:
            last_layer = self.vae.decoder.conv_out.weight
            pulls = last_layer_gradients(recon, last_layer, [grad, adversarial], self.ranks)
            weight = weight * adaptive_weight(*pulls, s.adaptive_most)
        return weight * adversarial, {"gan_loss": loss.detach(), "gan_weight": weight}

    def _teach_adversary(self, step, img, fake, lr) -> dict[str, torch.Tensor]:
        if step >= self.settings.gan_start:
            return self.adversary.step(img, fake, step, lr)
        return dict.fromkeys(LOGGED, self._scalar(0.0))

    def _revive(self, step: int, progress: float, img: torch.Tensor) -> None:
        """At the end of a window, move dead codes; windows are short at first, when the encoder moves fast."""
        s = self.settings
        window = min(s.revive_every, 20) if step < 2 * s.revive_every else s.revive_every or REPORT_EVERY
        if self.code_use.steps < window:
            return
        if s.revive_every and progress < s.revive_until:
            dead_V = self.code_use.dead_V(s.revive_below)
            revive_codes(
                self.vae,
                dead_V,
                img,
                step_seed(s.seed, step),
                ranks=self.ranks,
                optimizer=self.optimizer,
                average=self.ema.average,
            )
        self.code_use.close(s.revive_below)

    def evaluate(self) -> dict[str, Any]:
        """The averaged weights on the held-out pictures (PSNR, SSIM, code use and perplexity per scale), and the code
        use of the last window of training steps. Collective; the same on every rank."""
        from var_fast.evaluation.reconstruction import reconstruction_metrics

        found = {}
        if self.val is not None:
            share = max(1, self.settings.batch // self.ranks.count)
            where = dict(rank=self.ranks.rank, ranks=self.ranks.count, workers=self.workers)
            batches = evaluation_batches(self.val, self.augmentation, batch=share, limit=self.val_images, **where)
            metrics = reconstruction_metrics(self.ema.average, self._noting_skipped(batches), self.ranks)
            found = {f"val_{name}": value for name, value in metrics.items()}
        return {**found, **self.code_use.report()}

    def _noting_skipped(self, batches: Iterator[Batch]) -> Iterator[torch.Tensor]:
        for batch in batches:
            self.skipped.update(batch.skipped)
            yield self._images(batch)

    def badness(self, metrics: dict[str, Any]) -> float | None:
        """By the held-out PSNR."""
        return -metrics["val_psnr_db"] if "val_psnr_db" in metrics else None

    def tensors(self) -> dict[str, Any]:
        """Everything to go on from, with `facts`: the very tensors in use, to be saved, or filled in place."""
        found = {
            "model": self.vae.state_dict(),
            "ema": self.ema.average.state_dict(),
            "optimizer": adam_tensors(self.vae, self.optimizer),
            "code_use": self.code_use.tensors(),
        }
        return found if self.adversary is None else {**found, "adversary": self.adversary.tensors()}

    def facts(self) -> dict[str, Any]:
        """The rest, for JSON. Hashes tell which fixed networks the run is judged by, wherever their files lie."""
        return {
            "watched_steps": self.code_use.steps,
            "record_hit": self.vae.quantize.record_hit,
            **self._hashes,
            "images": self._images_hash,
        }

    def set_facts(self, facts: dict[str, Any]) -> None:
        """Takes back what `facts` returned. Raises UserError if the run had other pictures, or was judged by other
        weights, than these."""
        if facts["images"] != self._images_hash:
            raise UserError("data: its training pictures are not those the run began with; use the data it began with")
        for name, options in (("lpips_hash", "lpips_weights, vgg_weights"), ("features_hash", "dino_weights")):
            if facts[name] != self._hashes[name]:
                raise UserError(f"{options}: the run was begun with other weights than these files hold")
        self.code_use.steps = facts["watched_steps"]
        self.vae.quantize.record_hit = facts["record_hit"]

    @torch.no_grad()
    def draw_samples(self, path: Path, step: int) -> None:
        """A sheet of held-out pictures (or else training pictures), each beside its reconstruction by the averaged
        weights: always the same pictures. Collective; the main rank writes it."""
        with self.ranks.together():
            if self.ranks.is_main:
                source = self.val if self.val is not None else self.train
                for batch in evaluation_batches(source, self.augmentation, batch=SAMPLES, limit=SAMPLES):
                    img = self._images(batch)
                    again = self.ema.average.img_to_reconstructed_img(img, last_one=True)
                    pairs = torch.stack([img, again], 1).flatten(0, 1).add(1).mul(0.5).clamp(0, 1)
                    save_png(make_grid(pairs.cpu(), columns=8), path)

    def model_writer(self) -> Callable[[Path], None] | None:
        """Writes the averaged tokenizer in float32."""
        average = self.ema.average
        return (lambda folder: save_checkpoint(folder, average, dtype=torch.float32)) if self.ranks.is_main else None

    def batch_for_study(self, batch: Batch) -> dict[str, torch.Tensor]:
        """A batch as tensors, to be saved where a step went wrong."""
        return {"images_u8": batch.images_u8, "labels": batch.labels}


def _freeze_unused_phi(vae: VQVAE) -> None:
    """Of the shared phi layers, few scales leave some that no scale is nearest to: they never get a gradient, which
    DistributedDataParallel would wait for."""
    quantize = vae.quantize
    count = len(quantize.v_patch_nums)
    used = {id(p) for si in range(count) for p in quantize.quant_resi[scale_position(si, count)].parameters()}
    for p in quantize.quant_resi.parameters():
        p.requires_grad_(id(p) in used)
