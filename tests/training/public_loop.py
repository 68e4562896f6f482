"""Runs the public training loop (its VARTrainer and AmpOptimizer) for a few steps and prints its numbers as JSON.

python public_loop.py CHECKOUT ours|theirs: on our modules, or on those of the checkout. A script, since the public code
has top-level modules named models, utils and dist.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import torch


class Silent:
    """Stands in for the loggers."""

    log_iters = {2, 4, 6, 8}  # where the optimizer steps: elsewhere the loop has no norm to log

    def __init__(self):
        self.numbers = []

    def update(self, **numbers):
        self.numbers.append({k: float(v) for k, v in numbers.items() if k in ("Lm", "Lt", "Accm", "Acct", "tnm")})


def main() -> None:
    checkout, whose = sys.argv[1:]
    sys.path.insert(0, checkout)
    for name in ("tap", "pytz"):  # what the loop's logger imports: not needed here, and seldom installed
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    sys.modules["tap"].Tap = getattr(sys.modules["tap"], "Tap", object)
    if whose == "ours":
        import var_fast

        sys.modules["models"] = var_fast
    from models import VAR, VQVAE
    from torch.nn.parallel import DistributedDataParallel as DDP
    from trainer import VARTrainer
    from utils.amp_sc import AmpOptimizer
    from utils.lr_control import filter_params, lr_wd_annealing

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    patch_nums = (1, 2, 3, 4)
    vae = VQVAE(vocab_size=64, z_channels=8, ch=32, test_mode=True, v_patch_nums=patch_nums)
    var = VAR(
        vae_local=vae, num_classes=5, depth=3, embed_dim=64, num_heads=2, drop_path_rate=0.1, attn_l2_norm=True,
        patch_nums=patch_nums,
    )  # fmt: skip
    var.init_weights(init_adaln=0.5, init_adaln_gamma=1e-2, init_head=0.02, init_std=-1)
    for number, (name, p) in enumerate([*sorted(vae.named_parameters()), *sorted(var.named_parameters())]):
        if p.ndim > 1 or name.endswith("bias"):  # the others begin as constants
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.05)
    names, paras, groups = filter_params_quietly(filter_params, var)
    optimizer = AmpOptimizer(
        mixed_precision=0, optimizer=torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95)), names=names, paras=paras,
        grad_clip=2.0, n_gradient_accumulation=2,
    )  # fmt: skip
    ddp = DDP(var, find_unused_parameters=False, broadcast_buffers=False)
    trainer = VARTrainer("cpu", patch_nums, tuple(16 * pn for pn in patch_nums), vae, var, ddp, optimizer, 0.1)
    var.train()
    draw = torch.Generator().manual_seed(1)
    metrics, board = Silent(), Silent()
    norms = []
    for it in range(8):
        torch.manual_seed(it)
        images = torch.rand(4, 3, 64, 64, generator=draw) * 2 - 1
        labels = torch.randint(0, 5, (4,), generator=draw)
        lr_wd_annealing("lin0", optimizer.optimizer, 1e-3, 0.05, 0.05, it, 2, 8)
        stage = (-1, -1, 1, 1, 2, 2, 3, 3)[it]
        norm, _ = trainer.train_step(it + 1, it, it % 2 == 1, metrics, board, images, labels, stage, 4.0)
        norms.append(None if norm is None else float(norm))
    trainer.load_state_dict(trainer.state_dict())
    torch.manual_seed(99)
    held_out = trainer.eval_ep([(images, labels), (-images, labels)])[:4]
    numbers = {"steps": [n for n in metrics.numbers if n], "norms": norms, "held_out": [float(x) for x in held_out]}
    print("\n" + json.dumps(numbers))


def filter_params_quietly(filter_params, var):
    """The public function prints by means of a print of its own, with more arguments than Python's."""
    import utils.lr_control as module

    module.print = lambda *words, **options: None
    module.dist = types.SimpleNamespace(get_world_size=lambda: 0)
    return filter_params(var, nowd_keys={"pos_1LC", "pos_start", "lvl_embed", "ada_gss", "scale_mul"})


if __name__ == "__main__":
    main()
