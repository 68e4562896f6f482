"""Functions run on two real processes."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from var_fast.training.ranks import join_ranks


def on_two_ranks(*functions: Callable[..., Any]) -> list[list[Any]]:
    """For each function of a module, called with the Ranks, what it returned on rank 0 and on rank 1."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (folder, functions, _free_port()), nprocs=2)
        told = [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(2)]
    return [list(values) for values in zip(*told)]


def _work(rank: int, folder: str, functions: tuple, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with join_ranks(torch.device("cpu")) as ranks:
        values = [function(ranks) for function in functions]
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(values))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
