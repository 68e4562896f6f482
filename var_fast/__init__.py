"""var_fast: fast next-scale image generation (VAR, Tian et al. 2024), drop-in for the published modules."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from var_fast.checkpoint import load_checkpoint
    from var_fast.engine import Sampler
    from var_fast.models import VAR, VQVAE, VectorQuantizer2, build_vae_var

__version__ = "0.1.0"

__all__ = ["VAR", "VQVAE", "Sampler", "VectorQuantizer2", "__version__", "build_vae_var", "load_checkpoint"]

_HOME = {"Sampler": "engine", "load_checkpoint": "checkpoint"}


def __getattr__(name: str):
    # On first use: importing torch takes seconds, which `var-fast --help` need not wait for.
    if name not in __all__:
        raise AttributeError(f"module 'var_fast' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"var_fast.{_HOME.get(name, 'models')}"), name)
    return value
