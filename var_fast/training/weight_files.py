"""Published weights of the fixed networks that judge reconstructions: read from a file the user names, and checked."""

from __future__ import annotations

import torch
from torch import nn

from var_fast.checkpoint_files import first_line
from var_fast.errors import UserError


def read_weights(option: str, path: str, wanted: str) -> dict[str, torch.Tensor]:
    """The state dict in file `path`, which the user named with `option`. No code in it is ever run.

    Raises UserError that says what is `wanted` where there is no path, no file, or no state dict in it.
    """
    if not path:
        raise UserError(f"{option}: got no file, expected {wanted}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{option}: {path} does not exist, expected {wanted}") from None
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        raise UserError(f"{option}: cannot read {path}: {first_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{option}: {path} holds no state dict, expected {wanted}")
    return state


def load_frozen(module: nn.Module, state: dict[str, torch.Tensor], option: str, path: str) -> None:
    """Fills `module` from `state` and freezes it, in evaluation mode. Raises UserError that names the first entry that
    is missing or has another shape; entries that the module does not know are left out.
    """
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            found = f"shape {tuple(state[name].shape)}" if name in state else "no such entry"
            raise UserError(f"{option}: {path} has {found} for {name!r}, expected shape {tuple(tensor.shape)}")
    module.load_state_dict({name: state[name] for name in own})
    module.eval().requires_grad_(False)
