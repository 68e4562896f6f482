"""Runs every Triton kernel once on small shapes, forward and backward, and the native loop on a tiny model: the program
that the sanitizer watches."""

import torch

from bench.suites.ops import backend_implementations, cases
from var_fast import VAR, VQVAE, Sampler


def sample(device: torch.device) -> None:
    """Every leaf kernel of the native loop, captured and replayed, odd sizes, more than one image."""
    torch.manual_seed(0)
    patch_nums = (1, 2, 3, 5)
    vae = VQVAE(vocab_size=96, z_channels=8, ch=32, v_patch_nums=patch_nums, ch_mult=(1, 2))
    var = VAR(vae, num_classes=3, depth=2, embed_dim=64, num_heads=2, patch_nums=patch_nums, attn_l2_norm=True)
    for dtype in ("float32", "bfloat16", "float16"):
        sampler = Sampler(var, dtype=dtype, device=device)
        for more_smooth in (False, True):
            sampler.sample([0, 1, 2], [5, 6, 7], top_k=20, top_p=0.9, more_smooth=more_smooth)
            torch.cuda.synchronize()
        print(f"ran the native loop {dtype}")


if __name__ == "__main__":
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases(device, dtype, "small", cache_bytes=0):
            implementation = backend_implementations(case).get("triton")
            if implementation is not None:
                implementation.call(*case.inputs[0])
                torch.cuda.synchronize()
                print(f"ran {case.name} {dtype}")
    sample(device)
