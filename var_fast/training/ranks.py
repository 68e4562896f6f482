"""The processes of one run: one alone, or those that torchrun started (gloo on CPUs, nccl on GPUs)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from var_fast.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among the `count` of its run. Every method is a collective: all ranks call it, in one order."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")
    control: dist.ProcessGroup | None = None  # gloo, for plain Python values; None: one process

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all."""
        if self.count > 1:
            dist.barrier(group=self.control)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, on this run's device, replaced by its sum over the ranks."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, on this run's device, replaced by its mean over the ranks."""
        return self.sum_(tensor).div_(self.count) if self.count > 1 else tensor

    def concatenate(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors, of one shape, one after another along the first dimension."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def gather(self, value) -> list:
        """Every rank's picklable `value`, on every rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self.control)
        return values

    def to_main(self, value) -> list:
        """Every rank's picklable `value`, on the main rank; on the others their own alone."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values if self.is_main else [value]

    def from_main(self, value=None):
        """The main rank's picklable `value`, on every rank."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work that may fail on one rank alone: then every rank raises a UserError, and none waits for ever."""
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.count == 1:
            if failure is not None:
                raise failure
            return
        told = self.gather(None if failure is None else f"{failure}")
        if failure is not None:
            raise failure
        for rank, words in enumerate(told):
            if words is not None:
                raise UserError(f"rank {rank}: {words}")


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun's environment tells of, joined for the time of the block; without it, one alone.

    device: where this process computes, from `cli_models.pick_device`, which gives each process a GPU of its own.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks(device=device)
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    yield Ranks(rank, count, device, dist.new_group(backend="gloo", timeout=timedelta(days=7)))
    # Not after an error: to end the groups could wait for ranks that wait for this one, which the process's end tells.
    dist.destroy_process_group()
