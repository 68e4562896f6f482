"""The drop-in modules: names, signatures and state dicts of the published VAR code (Tian et al. 2024)."""

from var_fast.models.build import build_vae_var
from var_fast.models.quantizer import VectorQuantizer2
from var_fast.models.var import VAR
from var_fast.models.vqvae import VQVAE

__all__ = ["VAR", "VQVAE", "VectorQuantizer2", "build_vae_var"]
