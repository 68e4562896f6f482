"""One model on several ranks: replicated (DDP), or its weights, gradients and averages sharded (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from var_fast.errors import UserError
from var_fast.training.ranks import Ranks

STRATEGIES = ("ddp", "fsdp")


def parallelise(model: nn.Module, ranks: Ranks, strategy: str = "ddp", blocks: Iterable[nn.Module] = ()) -> nn.Module:
    """`model` so that gradients are means over the ranks; on one rank `model` itself.

    "ddp": DistributedDataParallel around it. "fsdp": fully_shard of each of `blocks` and of the rest, in place, so that
    parameters and what an optimizer keeps of them are shards. Raises UserError for another strategy.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"parallel: got {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if ranks.count == 1:
        return model
    if strategy == "ddp":
        # its successor is not in the oldest torch that this runs on
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        place = [ranks.device] if ranks.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=place, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The blocks hand on a gate that is a view; nothing is done to it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def gradients_stay(model: nn.Module, wanted: bool) -> Iterator[None]:
    """With `wanted`, gradients of the passes inside are summed up on their rank and not yet averaged over ranks."""
    if wanted and isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not wanted)
        yield
    else:
        yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a shard, on every rank; any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
