"""A transformer's trainer small enough for tests, on tokens that are a function of their position."""

from __future__ import annotations

from dataclasses import replace

import torch

from var_fast.models import VQVAE
from var_fast.training.order import batch_positions
from var_fast.training.ranks import Ranks
from var_fast.training.token_sources import TokenBatch
from var_fast.training.transfer import to_device
from var_fast.training.transformer import TransformerJob
from var_fast.training.transformer_settings import TransformerSettings

PATCH_NUMS, L, V = (1, 2, 3), 14, 20
TINY = TransformerSettings(depth=2, embed_dim=32, num_heads=2, batch=8, base_lr=0.2, ema=0.9, warmup=0.1, seed=3)


def tiny_vae() -> VQVAE:
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=V, z_channels=4, ch=32, ch_mult=(1, 1), v_patch_nums=PATCH_NUMS)
    vae.quantize.eini(0.5)
    return vae


class RandomTokens:
    """A source whose example at each position is a function of the position."""

    classes, images, skipped = ["a", "b", "c"], 40, frozenset()

    def example(self, position):
        draw = torch.Generator().manual_seed(position)
        return torch.randint(V, (L,), generator=draw), torch.randint(3, (), generator=draw)

    def stack(self, positions):
        tokens, labels = zip(*map(self.example, positions))
        return TokenBatch(torch.stack(labels), torch.stack(tokens))

    def batches(self, first_step, ranks, batch, passes, seed):
        step = first_step
        while True:
            shares = (
                batch_positions(step, batch, rank=ranks.rank, ranks=ranks.count, part=p, parts=passes)
                for p in range(passes)
            )
            yield [self.stack(share) for share in shares]
            step += 1

    def facts(self):
        return {"tokens": "random"}

    def tokens_of(self, batch, vae):
        device = vae.quantize.embedding.weight.device
        return to_device(batch.tokens_BL, device), to_device(batch.label_B, device)

    def held_out(self, vae, ranks):
        one = self.stack(range(1000, 1131))
        return one.tokens_BL, one.label_B


def job_of(ranks=None, steps=20, **changes) -> TransformerJob:
    vae = tiny_vae().to((ranks or Ranks()).device)
    return TransformerJob(replace(TINY, **changes), vae, RandomTokens(), ranks, steps)


def train(job, first, last, keep_gradients=False):
    """Steps first .. last - 1; what they return. The gradients stay in job.gradients."""
    batches, found = job.batches(first), []
    job.gradients = []
    real = job.precision.step

    def look(optimizer):
        full = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in job.var.parameters()]
        job.gradients.append([g.clone() for g in full])
        real(optimizer)

    job.precision.step = look
    for step in range(first, last):
        torch.manual_seed(step)
        found.append(job.step(step, step / 20, next(batches)))
    job.precision.step = real
    return found


def weights(job):
    entries = {**job.var.state_dict(), **{f"ema.{k}": v for k, v in job.average.state_dict().items()}}
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for k, v in entries.items()}


def assert_close(a, b, tolerance):
    for name in a:
        if torch.equal(a[name], b[name]):  # the mask has infinities
            continue
        error = (a[name].double() - b[name].double()).norm() / b[name].double().norm().clamp(min=1e-12)
        assert error <= tolerance, (name, float(error))
