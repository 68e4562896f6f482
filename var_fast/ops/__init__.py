"""Operators: one file each, with its contract, its plain PyTorch reference and the choice of backend."""

from var_fast.ops.adaln_modulate import (
    adaln_modulate,
    adaln_modulate_reference,
    residual_adaln_modulate,
    residual_adaln_modulate_reference,
)
from var_fast.ops.backend import choose_backend
from var_fast.ops.codebook_search import codebook_search, codebook_search_reference
from var_fast.ops.gelu import gelu, gelu_reference
from var_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_reference
from var_fast.ops.multiscale_quantize import multiscale_quantize, multiscale_quantize_reference
from var_fast.ops.pyramid_update import pyramid_update, pyramid_update_reference
from var_fast.ops.qk_norm import qk_norm, qk_norm_reference
from var_fast.ops.sample_tokens import filter_logits_, sample_tokens, sample_tokens_reference
from var_fast.ops.scale_attention import scale_attention, scale_attention_reference
from var_fast.ops.scale_cross_entropy import scale_cross_entropy, scale_cross_entropy_reference

__all__ = [
    "adaln_modulate",
    "adaln_modulate_reference",
    "choose_backend",
    "codebook_search",
    "codebook_search_reference",
    "filter_logits_",
    "gelu",
    "gelu_reference",
    "group_norm_silu",
    "group_norm_silu_reference",
    "multiscale_quantize",
    "multiscale_quantize_reference",
    "pyramid_update",
    "pyramid_update_reference",
    "qk_norm",
    "qk_norm_reference",
    "residual_adaln_modulate",
    "residual_adaln_modulate_reference",
    "sample_tokens",
    "sample_tokens_reference",
    "scale_attention",
    "scale_attention_reference",
    "scale_cross_entropy",
    "scale_cross_entropy_reference",
]
