"""What a peer is: a way to do what var_fast does, in a file of its own in this directory, found by its name."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import bench.peers
from bench.case import Case, Implementations
from var_fast.errors import UserError


class Peer:
    """Implementations of the cases it knows. The module bench/peers/<name>.py has a class `Peer`, one of these.

    `path_help`: what `--peer name=PATH` must name; "": the peer takes no path. The constructor raises UserError for a
    path that is not that. Each method takes a case of the suite (and its subject, see bench/suites) and returns
    implementations by name, none if the case is nothing to it, a CannotRun where it cannot run here.
    """

    path_help = ""

    def __init__(self, path: Path | None = None):
        self.path = path

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def begin(self) -> None:
        """Called before each group of cases; what was kept for earlier ones may go."""

    def sample(self, case: Case) -> Implementations:
        return {}

    def train(self, case: Case) -> Implementations:
        return {}

    def tokenize(self, case: Case) -> Implementations:
        return {}

    def ops(self, case: Case) -> Implementations:
        return {}


@contextmanager
def on_path(path: Path) -> Iterator[None]:
    """What is imported inside may come from `path`."""
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))


def peer_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(bench.peers.__path__) if module.name != "base")


def load_peer(text: str) -> Peer:
    """The peer of `NAME` or `NAME=PATH`. Raises UserError for an unknown name, a missing or a needless path."""
    name, equals, path = text.partition("=")
    if name not in peer_names():
        raise UserError(f"--peer is {name!r}, expected one of {', '.join(peer_names())}")
    peer_class = importlib.import_module(f"bench.peers.{name}").Peer
    if not peer_class.path_help:
        if equals:
            raise UserError(f"--peer {name} takes no path, and got {path!r}")
        return peer_class()
    if not path:
        raise UserError(f"--peer {name} needs a path, {name}=PATH: {peer_class.path_help}")
    if not Path(path).exists():
        raise UserError(f"--peer {name}={path}: there is no such path")
    return peer_class(Path(path).resolve())
