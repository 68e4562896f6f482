"""var_fast: fast next-scale image generation (VAR, Tian et al. 2024), drop-in for the published modules."""

from var_fast.engine import Sampler
from var_fast.models import VAR, VQVAE, VectorQuantizer2, build_vae_var

__version__ = "0.1.0"

__all__ = ["VAR", "VQVAE", "Sampler", "VectorQuantizer2", "__version__", "build_vae_var"]
