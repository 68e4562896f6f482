"""ModelWatch: whether a model, its layers and their weights, is still the one that was looked at."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from var_fast.engine.file_pages import FilePages
from var_fast.models import VAR

METHODS = {  # what the modules call of each other in sampling: one set on an instance is another model
    *("forward", "forward_modulated", "modulation", "get_logits", "sample_scales", "__getitem__"),
    *("fhat_to_img", "add_tokens", "get_next_autoregressive_input", "tokens_to_map", "_phi"),
}


def is_changed(module: nn.Module) -> bool:
    """Whether the module does more or other things than its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or not METHODS.isdisjoint(vars(module))


class ModelWatch:
    """Looks at a transformer and its tokenizer; keeps their tensors (so that none can take another's address), but not
    the transformer itself alive."""

    def __init__(self, var: VAR):
        self._root = weakref.ref(var)
        self._modules = [module for module in (*var.modules(), *var.vae_proxy[0].modules()) if module is not var]
        self._slots = [
            (places, name, value)
            for module in (var, *self._modules)
            for places in (module._modules, module._parameters, module._buffers)
            for name, value in places.items()
        ]
        self._tensors = [value for _, _, value in self._slots if isinstance(value, torch.Tensor)]
        # a look at weights that are mapped from a file would bring 64 KB of each into memory
        pages = FilePages()
        self._in_memory = [tensor for tensor in self._tensors if tensor.is_cpu and not pages.hold(tensor)]

    def same_layers(self) -> bool:
        """Whether every layer and every tensor is the same object, and none has a hook."""
        return all(places.get(name) is value for places, name, value in self._slots) and not any(
            is_changed(module) for module in (self._root(), *self._modules)
        )

    def weights(self) -> tuple:
        """Differs when the tensors' values were changed: by torch's count of changes in place, by their addresses, by
        how often training began, and by a look at a few values of those in the CPU's memory. The count alone is blind
        to changes through `.data` and by fused optimizers."""
        from var_fast import _C

        counted = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in self._tensors)
        return counted, self._root().times_trained, _C.fingerprint(self._in_memory)
