"""KVCache: keys and values of the scales already sampled, written in place."""

from __future__ import annotations

import torch


class KVCache:
    """Room for `capacity` tokens; doubles when more come, so that no scale copies the earlier ones.

    Where gradients are wanted it concatenates instead: what autograd has seen may not be overwritten.
    """

    def __init__(self, capacity: int = 0):
        self.capacity, self.length = capacity, 0
        self.kv_2BHLD: torch.Tensor | None = None

    def append(self, k_BLHD: torch.Tensor, v_BLHD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values (B, l, H, D) and returns all so far as (B, L, H, D) views."""
        if torch.is_grad_enabled() and (k_BLHD.requires_grad or v_BLHD.requires_grad):
            return self._concatenate(k_BLHD, v_BLHD)
        B, added, H, D = k_BLHD.shape
        end = self.length + added
        if self.kv_2BHLD is None or end > self.kv_2BHLD.shape[3]:
            self.capacity = max(self.capacity, end if self.kv_2BHLD is None else 2 * end)
            grown = k_BLHD.new_empty(2, B, H, self.capacity, D)
            if self.kv_2BHLD is not None:
                grown[:, :, :, : self.length] = self.kv_2BHLD[:, :, :, : self.length]
            self.kv_2BHLD = grown
        self.kv_2BHLD[0, :, :, self.length : end] = k_BLHD.transpose(1, 2)
        self.kv_2BHLD[1, :, :, self.length : end] = v_BLHD.transpose(1, 2)
        self.length = end
        k_BHLD, v_BHLD = self.kv_2BHLD[:, :, :, :end]
        return k_BHLD.transpose(1, 2), v_BHLD.transpose(1, 2)

    def _concatenate(self, k_BLHD, v_BLHD):
        kv_2BHLD = torch.stack((k_BLHD, v_BLHD)).transpose(2, 3)
        if self.kv_2BHLD is not None:
            kv_2BHLD = torch.cat((self.kv_2BHLD[:, :, :, : self.length], kv_2BHLD), dim=3)
        self.kv_2BHLD, self.length = kv_2BHLD, kv_2BHLD.shape[3]
        k_BHLD, v_BHLD = kv_2BHLD
        return k_BHLD.transpose(1, 2), v_BHLD.transpose(1, 2)
