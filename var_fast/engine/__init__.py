"""Sampling: random numbers of one image, and the Sampler."""

from var_fast.engine.sampler import Sampler

__all__ = ["Sampler"]
