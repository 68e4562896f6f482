"""The program that the sanitizer watches: every Triton kernel once on small shapes, forward and backward, every CUDA
operator, and the native loop on a tiny model."""

import torch

from bench.suites.ops import backend_implementations, cases
from tests.cuda import checks
from tests.cuda.device import DeviceOperators
from var_fast import VAR, VQVAE
from var_fast.engine.native_loop import NativeLoop
from var_fast.engine.options import SamplingOptions


def sample(device: torch.device) -> None:
    """Every leaf kernel of the native loop, odd sizes, more than one image. Not as a graph: without the caching
    allocator, which would hide errors, nothing can be allocated while one is captured."""
    torch.manual_seed(0)
    patch_nums = (1, 2, 3, 5)
    vae = VQVAE(vocab_size=96, z_channels=8, ch=32, v_patch_nums=patch_nums, ch_mult=(1, 2))
    var = VAR(vae, num_classes=3, depth=2, embed_dim=64, num_heads=2, patch_nums=patch_nums, attn_l2_norm=True)
    vae.to(device).eval()
    var.to(device).eval()
    label_B, seed_B = torch.tensor([0, 1, 2], device=device), torch.tensor([5, 6, 7], device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loop = NativeLoop(var, dtype)
        for more_smooth in (False, True):
            with torch.no_grad():
                loop.sample(label_B, seed_B, SamplingOptions(1.5, 20, 0.9, more_smooth))
            torch.cuda.synchronize()
        print(f"ran the native loop {dtype}")


def cuda_operators() -> None:
    """At sizes that no tile divides; the draw with every kind of logits, so that all its paths are taken."""
    ops = DeviceOperators()
    for dtype in checks.DTYPES:
        checks.check_residual_adaln_modulate(ops, dtype, R=3, L=2, C=1032, M=2)
        checks.check_qk_norm(ops, dtype, S=2, R=3, l=5, H=3, D=96, begin=2, capacity=8)
        checks.check_scale_attention(ops, dtype, R=2, l=19, H=3, D=64, length=55, capacity=60)
        checks.check_scale_attention(ops, dtype, R=1, l=3, H=2, D=128, length=530, capacity=530)
        checks.check_group_norm_silu(ops, dtype, B=2, hw=611, C=160, groups=32)
        checks.check_group_norm_silu(ops, dtype, B=2, hw=37, C=30, groups=5)
        checks.check_group_norm_silu_of_a_sum(ops, dtype, B=2, hw=611, C=160, groups=32, residual=True)
        checks.check_add_bias_residual(ops, dtype, 37, 30, bias=True, residual=True)
        checks.check_weave_phases(ops, dtype, B=2, h=3, w=5, C=32)
        checks.check_gelu(ops, dtype, 4099)
    checks.check_scale_attention(ops, torch.bfloat16, R=18, l=33, H=19, D=32, length=5, capacity=5)
    checks.check_image_of_taps(ops, B=2, h=7, w=9)
    for dtype in checks.DTYPES[1:]:
        checks.check_skinny_linear(ops, dtype, M=3, N=40, K=264, gelu=True)
        checks.check_skinny_linear(ops, dtype, M=31, N=40, K=2056, float_out=True)
        checks.check_transformer_blocks(ops, dtype, S=3, R=4, l=1, H=2, hidden=512)
        checks.check_transformer_blocks(ops, dtype, S=2, R=2, l=49, H=3, hidden=264, begin=14)
    for kind in ("normal", "ties", "equal", "wide", "outlier", "zeros", "tiny"):
        checks.check_draw_tokens(ops, B=2, l=3, V=1003, top_k=600, top_p=0.9017, kind=kind)
    checks.check_draw_tokens(ops, B=2, l=3, V=4096, top_k=0, top_p=0.9017, kind="outlier")
    checks.check_pyramid_update(ops, B=2, C=32, h=16, pn=5, pn_next=6)
    checks.check_pyramid_update(ops, B=1, C=9, h=7, pn=3, pn_next=0, codes=True)
    checks.check_pyramid_update(ops, B=1, C=32, h=32, pn=18, pn_next=24)
    print("ran the CUDA operators")


if __name__ == "__main__":
    device = torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases(device, dtype, "small", cache_bytes=0):
            implementation = backend_implementations(case).get("triton")
            if implementation is not None:
                implementation.call(*case.inputs[0])
                torch.cuda.synchronize()
                print(f"ran {case.name} {dtype}")
    cuda_operators()
    sample(device)
