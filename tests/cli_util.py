"""What the tests of commands share: a tiny random model, what was written, and bad input that is refused."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from var_fast import VAR, VQVAE
from var_fast.checkpoint import save_checkpoint
from var_fast.cli import main
from var_fast.images import load_image

CLASSES = ["face-smiling", "Flags", "cat, tabby", "dog"]
SIZE = 4  # pixels: the largest patch number, 2, times 2


def save_tiny_model(directory: Path) -> None:
    """A random model of SIZE pixels and four classes."""
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=16, z_channels=4, ch=32, v_patch_nums=(1, 2), ch_mult=(1, 2))
    # Random decoders give images near grey; spread them, so that images differ after rounding too.
    vae.decoder.conv_out.weight.data.mul_(4)
    var = VAR(vae, num_classes=4, depth=2, embed_dim=32, num_heads=2, patch_nums=(1, 2), attn_l2_norm=True)
    var.init_weights(init_head=1.0)
    save_checkpoint(directory, vae, var, classes=CLASSES)


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def refused(capsys, folder, *arguments) -> str:
    """Runs bad input; returns its one line. Fails if a file is made, or if it is not code 2 and one line on stderr."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before
    return err


def read(path) -> tuple[torch.Tensor, dict[str, str]]:
    """Picture (3, H, W) in [0, 1] and text chunks."""
    with Image.open(path) as picture:
        text = dict(picture.text)
    return load_image(path).add(1).div(2), text
