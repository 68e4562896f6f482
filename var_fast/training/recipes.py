"""How the published transformers were trained, by name, and two for a CPU: "small" learns something in ten minutes,
"demo" has the shape of the model in this package."""

from __future__ import annotations

from typing import Any

from var_fast.layout import PUBLISHED_PATCH_NUMS

# The published training commands (README and argument defaults of the code of Tian et al. 2024). Drop path, the head's
# start and so on are the defaults of TransformerSettings; the learning rate is that of 256 images, as there.
# `epochs` is the length of the run, `patch_nums` what the tokenizer's have to be.
_PUBLISHED: dict[str, Any] = dict(
    embed_dim=0,
    num_heads=0,
    drop_path=-1.0,
    base_lr=1e-4,
    schedule="lin0",
    warmup=1 / 50,
    first_lr=0.005,
    weight_decay=0.05,
    clip=2.0,
    precision="float16",
    cond_drop=0.1,
    ema=0.0,
    patch_nums=PUBLISHED_PATCH_NUMS[256],
)

TRANSFORMER_PRESETS: dict[str, dict[str, Any]] = {
    "small": {"depth": 4, "embed_dim": 192, "num_heads": 3, "ema": 0.99},
    "demo": {},
    "d16": {**_PUBLISHED, "depth": 16, "batch": 768, "epochs": 200.0, "gate_start": 1e-3, "last_lr": 0.1},
    "d20": {**_PUBLISHED, "depth": 20, "batch": 768, "epochs": 250.0, "gate_start": 1e-3, "last_lr": 0.1},
    "d24": {
        **_PUBLISHED,
        **{"depth": 24, "batch": 768, "epochs": 350.0, "base_lr": 8e-5, "gate_start": 1e-4, "last_lr": 0.01},
    },
    "d30": {
        **_PUBLISHED,
        **{"depth": 30, "batch": 1024, "epochs": 350.0, "base_lr": 8e-5, "gate_start": 1e-5, "last_lr": 0.01},
        "last_weight_decay": 0.08,
    },
    "d36-512": {
        **_PUBLISHED,
        **{"depth": 36, "batch": 768, "epochs": 350.0, "base_lr": 8e-5, "gate_start": 5e-6, "last_lr": 0.01},
        **{"last_weight_decay": 0.08, "shared_aln": True, "patch_nums": PUBLISHED_PATCH_NUMS[512]},
    },
}
