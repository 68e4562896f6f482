"""The discriminator that a tokenizer may be trained against: two networks, their losses, and the weight they get."""

from var_fast.training.adversary.adversary import DISCRIMINATORS, LOGGED, Adversary, build_adversary

__all__ = ["DISCRIMINATORS", "LOGGED", "Adversary", "build_adversary"]
