"""A tokenizer's trainer small enough for tests: a step takes some ten milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.training.fake_pictures import FakePictures
from var_fast.training import tokenizer as tokenizer_module
from var_fast.training.adversary import adversary as adversary_module
from var_fast.training.adversary.vit import VitFeatures
from var_fast.training.lpips import STAGES, Lpips
from var_fast.training.order import step_seed
from var_fast.training.ranks import Ranks
from var_fast.training.tokenizer import TokenizerJob
from var_fast.training.tokenizer_settings import TokenizerSettings

TINY = TokenizerSettings(
    size=16,
    vocab_size=24,
    z_channels=4,
    ch=32,
    ch_mult=(1, 1, 1),
    patch_nums=(1, 2, 4),
    batch=4,
    warmup_steps=2,
    revive_every=3,
    kmeans_batches=2,
    ema=0.9,
    gan_start=0,
    seed=3,
)
TRAIN, VAL = FakePictures(20), FakePictures(7, first=1000)


def make_job(settings: TokenizerSettings, ranks: Ranks | None = None, val=VAL, start: bool = True) -> TokenizerJob:
    job = TokenizerJob(settings, TRAIN, val, ranks)
    if start:
        job.start()
    return job


def run_steps(job: TokenizerJob, first: int, last: int, of: int = 20, batches=None) -> list[dict[str, float]]:
    """As the loop does it: steps first .. last - 1 of a run of so many."""
    batches, found = batches or job.batches(first), []
    for step in range(first, last):
        torch.manual_seed(step_seed(job.settings.seed, step))
        found.append({k: float(v) for k, v in job.step(step, step / of, next(batches)).items()})
    return found


def flat(tensors: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    found = {}
    for name, value in tensors.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return found


def write_weight_files(folder: Path) -> dict[str, str]:
    """Random weights in the files that LPIPS and the DINO discriminator read; their paths by option."""
    torch.manual_seed(0)
    vit, lpips = VitFeatures(64, 4, 2), Lpips()
    torch.nn.init.normal_(vit.pos_embed, std=0.1)
    torch.save(vit.state_dict(), folder / "vit.pth")
    torch.save({f"features.{name}": t for name, t in lpips.features.state_dict().items()}, folder / "vgg.pth")
    linear = {f"lin{i}.model.1.weight": torch.rand(1, widths[-1], 1, 1) for i, widths in enumerate(STAGES)}
    torch.save(linear, folder / "lpips.pth")
    names = {"dino_weights": "vit", "vgg_weights": "vgg", "lpips_weights": "lpips"}
    return {option: str(folder / f"{name}.pth") for option, name in names.items()}


def catch_gradients(monkeypatch, job: TokenizerJob) -> dict[str, dict[str, torch.Tensor]]:
    """Filled by the next step: the gradients of both networks, as they are before they are clipped."""
    caught = {}

    def catch(name, model, real):
        def clip_and_step(optimizer, parameters, limit):
            caught[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            return real(optimizer, parameters, limit)

        return clip_and_step

    for module, name, model in (
        (tokenizer_module, "model", job.vae),
        (adversary_module, "discriminator", job.adversary and job.adversary.network),
    ):
        monkeypatch.setattr(module, "clip_and_step", catch(name, model, module.clip_and_step))
    return caught
