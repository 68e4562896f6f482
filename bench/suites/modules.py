"""How our modules run a case, on whatever backends are chosen while they do: the public calls a user would write."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch

from bench.case import Case
from bench.suites.train import step
from var_fast import Sampler


def autocast(case: Case):
    """The types that the case asks for; nothing for float32."""
    if case.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(case.device.type, dtype=case.dtype)


def sample(case: Case) -> Callable:
    """(labels, seeds) -> images, by Sampler.sample."""
    subject = case.subject
    dtype = str(case.dtype).removeprefix("torch.")

    @cache
    def sampler() -> Sampler:  # made in the first call, for it keeps to the backend that is chosen then
        return Sampler(subject.models.var, dtype=dtype, max_batch=case.batch)

    def run(labels, seeds):
        subject.models.var.eval()
        return sampler().sample(labels, seeds, cfg=subject.cfg, top_k=subject.top_k, top_p=subject.top_p)

    return run


def train(case: Case) -> Callable:
    """A step of VAR.loss under autocast."""
    var = case.subject.models.var

    def value(label_B, x_BLCv_wo_first_l, target_BL):
        var.train()
        with autocast(case):
            return var.loss(label_B, x_BLCv_wo_first_l, target_BL)[0]

    return step(var, value)


def tokenize(case: Case) -> Callable:
    """Images -> tokens or images, by the tokenizer's public calls."""
    vae, decode = case.subject.models.vae, case.subject.decode

    @torch.no_grad()
    def run(images):
        with autocast(case):
            if decode:
                return vae.img_to_reconstructed_img(images, last_one=True)
            return vae.img_to_idxBl(images)

    return run
