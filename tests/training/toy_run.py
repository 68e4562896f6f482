"""A toy run for the tests of checkpoints, few weights but of every kind that is saved; and processes to run it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._dynamo  # which the optimizers import when first used: once here, not in every fork
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from var_fast.training.adam_state import adam_tensors
from var_fast.training.ranks import Ranks, join_ranks
from var_fast.training.run_checkpoints import RunCheckpoints


class Toy(nn.Module):
    """(B, 2, 4, 4) -> (B, 1). Parameters of 4, 2 and 1 dimensions, one of a single row; integer and bool buffers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.inner = nn.Linear(20, 7)
        self.head = nn.Linear(7, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("used", torch.zeros(3, dtype=torch.bool))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.used[int(self.seen) % 3] = True
        return self.head(self.inner(self.conv(x_BCHW).flatten(1)).tanh())


class Run:
    """The toy on this rank: kind "plain" (one rank), "ddp" or "fsdp"."""

    def __init__(self, kind: str, fused: bool, ranks: Ranks, seed: int = 0):
        torch.manual_seed(seed)
        self.model, self.ranks = Toy(), ranks
        if kind == "fsdp":
            mesh = init_device_mesh("cpu", (ranks.count,))
            fully_shard(self.model.inner, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        else:  # fully_shard takes contiguous parameters only
            self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=fused)
        self.forward = DistributedDataParallel(self.model) if kind == "ddp" else self.model
        self.losses: list[float] = []

    def step(self) -> None:
        """One step; its data follow from its number and the rank."""
        torch.manual_seed(1000 * len(self.losses) + self.ranks.rank)
        x, y = torch.randn(3, 2, 4, 4), torch.randn(3, 1)
        loss = nn.functional.mse_loss(self.forward(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(self.ranks.mean_(loss.detach().clone()).item())

    def tensors(self) -> dict:
        """What a checkpoint holds."""
        return {"model": self.model.state_dict(), "adam": adam_tensors(self.model, self.optimizer)}

    def save(self, checkpoints: RunCheckpoints, **kind) -> None:
        checkpoints.save(len(self.losses), self.tensors(), {"losses": self.losses}, **kind)

    def load(self, checkpoints: RunCheckpoints, path: Path) -> None:
        self.losses = checkpoints.load(path, self.tensors())["losses"]

    def whole(self) -> dict[str, torch.Tensor]:
        """Copies of every tensor, whole ones on every rank."""
        tensors = self.tensors()
        flat = {f"model/{name}": tensor for name, tensor in tensors["model"].items()}
        for name, state in tensors["adam"].items():
            flat |= {f"adam/{name}/{key}": tensor for key, tensor in state.items()}
        flat = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in flat.items()}
        return {name: tensor.detach().clone() for name, tensor in flat.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bitwise, dtypes too."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def fork_ranks(count: int, work: Callable[[Ranks], None]) -> list[int]:
    """Start `work` in `count` forked processes joined as ranks; their process ids."""
    sys.stdout.flush()
    port, pids = free_port(), []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(count))
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                with join_ranks(torch.device("cpu")) as ranks:
                    work(ranks)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def finished(pids: list[int]) -> bool:
    """Waits for the processes; whether all ended well."""
    return all([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in pids])


@contextmanager
def full_disk(bytes_left: int):
    """Every file that grows beyond `bytes_left` is refused, as by a full disk."""
    import resource
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
