"""why_not_native: whether the C++ sampling loop can stand for a model's modules."""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from torch import nn

from var_fast.engine.model_watch import is_changed
from var_fast.models import VAR, VQVAE
from var_fast.models.block import SelfAttention
from var_fast.models.drop_path import DropPath
from var_fast.models.no_initialisation import NoInitialisation

# what the CUDA operators take (csrc/cuda/ops_cuda.h)
MOST_CHANNELS, MOST_HEAD_CHANNELS, MOST_CODES, MOST_WIDTH = 4608, 128, 12800, 2048
SHARED_MEMORY = 160 * 1024  # bytes that sm_80, the smallest, has for pyramid_update


def why_not_native(var: VAR) -> str | None:
    """Why the native loop cannot stand for this model, or None if it can.

    It reads the weights of the layers that the model's class has. One that was replaced, resized or hooked into
    (adapters, pruned or quantised layers, probes) would not be heard, or worse.
    """
    vae, device = var.vae_proxy[0], var.lvl_1L.device
    if type(var) is not VAR or type(vae) is not VQVAE:
        return f"it is a {type(var).__name__} with a {type(vae).__name__}, classes that the native loop does not know"
    try:
        layers, shapes = _as_built(json.dumps(vae.config), json.dumps(var.config))
    except (TypeError, ValueError) as error:
        return f"its config does not build: {error}"
    own_layers = [*var.named_modules(), *vae.named_modules()]
    own_kinds = [(name, _kind(layer)) for name, layer in own_layers]
    if own_kinds != layers:
        other = next((pair for pair in own_kinds if pair not in set(layers)), None)
        return f"{other[0]} is a {other[1].__name__}, not what its class has there" if other else "a layer is missing"
    for name, layer in own_layers:
        if is_changed(layer):
            return f"{name or 'the model'} has a hook or a method of its own"
        if layer.training and (isinstance(layer, nn.Dropout | DropPath) or _drops(layer)):
            return f"{name} is in training mode"
    for (name, weight), shape in zip((*var.named_parameters(), *vae.named_parameters()), shapes, strict=False):
        if (name, tuple(weight.shape)) != shape:
            return f"{name} has shape {tuple(weight.shape)}, expected {shape[0]} of {shape[1]}"
        if weight.dtype != torch.float32 or weight.device != device:
            return f"{name} is {weight.dtype} on {weight.device}, expected torch.float32 on {device}"
    return _beyond_cuda(var) if device.type == "cuda" else None


def _kind(layer: nn.Module) -> type:
    """The class; one for those that do nothing but in training."""
    return nn.Identity if isinstance(layer, nn.Dropout | DropPath) else type(layer)


def _drops(layer: nn.Module) -> bool:
    return isinstance(layer, SelfAttention) and layer.attn_drop > 0


@lru_cache(maxsize=8)
def _as_built(vae_config: str, var_config: str) -> tuple[list, list]:
    """(name, kind) of every layer and (name, shape) of every parameter of a new model."""
    # Memory that is never written to is not taken. The meta device would import 140 MB of Python modules, in a second.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), NoInitialisation():
        vae = VQVAE(**json.loads(vae_config))
        var = VAR(vae, **json.loads(var_config))
    layers = [(name, _kind(layer)) for model in (var, vae) for name, layer in model.named_modules()]
    shapes = [(name, tuple(p.shape)) for model in (var, vae) for name, p in model.named_parameters()]
    return layers, shapes


def _beyond_cuda(var: VAR) -> str | None:
    head, side, vae = var.C // var.num_heads, var.patch_nums[-1], var.vae_proxy[0]
    widest = vae.config["ch"] * max(vae.config["ch_mult"])
    if var.C % 8 or var.C > MOST_CHANNELS:
        return f"embed_dim is {var.C}, the CUDA operators take multiples of 8 up to {MOST_CHANNELS}"
    if head % 8 or head > MOST_HEAD_CHANNELS:
        return f"a head has {head} channels, the CUDA operators take multiples of 8 up to {MOST_HEAD_CHANNELS}"
    if var.V > MOST_CODES:
        return f"there are {var.V} codes, the CUDA operators take up to {MOST_CODES}"
    if widest > MOST_WIDTH:
        return f"the decoder has {widest} channels, the CUDA operators take up to {MOST_WIDTH}"
    if 4 * var.Cvae * (side + 2) * side > SHARED_MEMORY:
        return f"a map of {side} x {side} x {var.Cvae} does not fit into shared memory"
    return None
