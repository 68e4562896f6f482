"""The numbers the model card states: PSNR, code use, loss and accuracy per scale against a unigram baseline."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from var_fast.models import VAR, VQVAE
from var_fast.training.emoji import to_float


def psnr_B(a_B3HW: torch.Tensor, b_B3HW: torch.Tensor) -> torch.Tensor:
    """(B,) peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    mse_B = (a_B3HW - b_B3HW).square().flatten(1).mean(1)
    return -10.0 * torch.log10(mse_B.clamp(min=1e-10))


@torch.no_grad()
def tokenizer_metrics(vae: VQVAE, images_u8: torch.Tensor, batch: int = 64) -> dict[str, float]:
    """Reconstruction of uint8 pictures (N, 3, S, S): mean of the per-picture PSNR in dB, percent of codes used."""
    device = next(vae.parameters()).device
    used_V = torch.zeros(vae.vocab_size, dtype=torch.bool)
    psnrs = []
    for chunk in images_u8.split(batch):
        img = to_float(chunk).to(device)
        idx_Bl = vae.img_to_idxBl(img)
        recon = vae.idxBl_to_img(idx_Bl, same_shape=True, last_one=True).clamp(-1.0, 1.0)
        psnrs.append(psnr_B(recon.add(1).mul(0.5), img.add(1).mul(0.5)).cpu())
        used_V[torch.cat([i.flatten() for i in idx_Bl]).cpu()] = True
    return {"psnr_db": float(torch.cat(psnrs).mean()), "code_use_percent": 100.0 * float(used_V.float().mean())}


@torch.no_grad()
def tokenise(vae: VQVAE, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """(N, L) int16 or int32 tokens of pictures in [-1, 1], all scales one after another."""
    device = next(vae.parameters()).device
    dtype = torch.int16 if vae.vocab_size <= 2**15 else torch.int32
    return torch.cat([torch.cat(vae.img_to_idxBl(img.to(device)), 1).to("cpu", dtype) for img in batches])


def split_scales(tokens_BL: torch.Tensor, patch_nums: tuple[int, ...]) -> list[torch.Tensor]:
    """(B, L) -> one (B, pn * pn) int64 tensor per scale."""
    return list(tokens_BL.long().split([pn * pn for pn in patch_nums], dim=1))


def unigram_baseline(
    train_NL: torch.Tensor, held_out_ML: torch.Tensor, patch_nums: tuple[int, ...], vocab_size: int
) -> dict[str, list[float]]:
    """Per scale, the loss (nats) and accuracy (percent) of always predicting that scale's token frequencies.

    Frequencies come from the training tokens, with one added to every count; the guess is the most frequent token.
    """
    losses, accuracies = [], []
    pairs = zip(split_scales(train_NL, patch_nums), split_scales(held_out_ML, patch_nums), strict=True)
    for train_Nl, held_Ml in pairs:
        count_V = torch.bincount(train_Nl.flatten(), minlength=vocab_size).double() + 1.0
        log_p_V = (count_V / count_V.sum()).log()
        losses.append(float(-log_p_V[held_Ml].mean()))
        accuracies.append(100.0 * float((held_Ml == count_V.argmax()).double().mean()))
    return {"loss": losses, "accuracy_percent": accuracies}


@torch.no_grad()
def transformer_metrics(
    var: VAR, vae: VQVAE, tokens_NL: torch.Tensor, labels_N: torch.Tensor, batch: int = 64
) -> dict[str, list[float]]:
    """Per scale, teacher-forced loss (nats) and accuracy (percent) of `var` (in eval mode) on the given tokens."""
    device = next(var.parameters()).device
    patch_nums = tuple(vae.quantize.v_patch_nums)
    loss_k, accuracy_k = torch.zeros(len(patch_nums)), torch.zeros(len(patch_nums))
    keep, var.cond_drop_rate = var.cond_drop_rate, 0.0  # the label is always given here
    try:
        for tokens_BL, label_B in zip(tokens_NL.split(batch), labels_N.split(batch), strict=True):
            tokens_BL, label_B = tokens_BL.long().to(device), label_B.to(device)
            x_BLC = vae.quantize.idxBl_to_var_input(split_scales(tokens_BL, patch_nums))
            _, batch_loss_k, batch_accuracy_k = var.loss(label_B, x_BLC, tokens_BL)
            loss_k += len(label_B) * batch_loss_k.cpu()
            accuracy_k += len(label_B) * batch_accuracy_k.cpu()
    finally:
        var.cond_drop_rate = keep
    images = tokens_NL.shape[0]
    return {"loss": (loss_k / images).tolist(), "accuracy_percent": (100.0 * accuracy_k / images).tolist()}
