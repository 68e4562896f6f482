"""Triton kernels, one file per operator. Installed as `var_fast.kernels`; they know tensors, never modules."""
