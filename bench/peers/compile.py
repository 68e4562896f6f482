"""What a user would try first: torch.compile of the plain modules and of the reference operators."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from bench.backends import use_backend
from bench.case import CannotRun, Case, Implementation, Implementations
from bench.peers import base
from bench.suites import modules
from bench.suites.ops import as_implementation, reference_function


class Peer(base.Peer):
    """On a GPU with mode max-autotune. CUDA graphs are part of it for training and tokenizing alone: they do not take
    the sampling loop's growing cache, and would copy an operator's rotated inputs to a place of their own each time."""

    def begin(self) -> None:
        forget_compiled()

    def sample(self, case: Case) -> Implementations:
        var, vae = case.subject.models.var, case.subject.models.vae
        loop = modules.sample(case)

        def build():
            # the loop itself is Python: what is compiled is a block, for all blocks and scales, and the decoder
            functions = [(block, "forward_modulated") for block in var.blocks] + [(vae.decoder, "forward")]
            return loop, functions

        return self._compiled(case, build, graphs=False)

    def train(self, case: Case) -> Implementations:
        var = case.subject.models.var
        return self._compiled(case, lambda: (modules.train(case), [(var, "loss")]))

    def tokenize(self, case: Case) -> Implementations:
        vae = case.subject.models.vae
        functions = [(vae.encoder, "forward"), (vae.decoder, "forward")]
        return self._compiled(case, lambda: (modules.tokenize(case), functions))

    def ops(self, case: Case) -> Implementations:
        if problem := _problem(case):
            return {"compile": CannotRun(problem)}
        compiled = torch.compile(reference_function(case), mode=_mode(case, graphs=False))
        return {"compile": replace(as_implementation(case, compiled), compiles=True)}

    def _compiled(self, case: Case, build: Callable, graphs: bool = True) -> Implementations:
        if problem := _problem(case):
            return {"compile": CannotRun(problem)}
        call, functions = build()
        mode = _mode(case, graphs)
        replaced = [(owner, name, torch.compile(getattr(owner, name), mode=mode)) for owner, name in functions]

        def run(*inputs):
            with use_backend("reference"), _in_place_of(replaced):
                return call(*inputs)

        return {"compile": Implementation(run, compiles=True)}


def forget_compiled() -> None:
    """Drops what torch.compile has made. It gives up on a function after some shapes, and then runs it uncompiled in
    silence: each group of cases begins with none, and 64 are allowed."""
    import torch._dynamo

    torch._dynamo.reset()
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), 64))


@contextlib.contextmanager
def _in_place_of(replaced: list[tuple[object, str, Callable]]) -> Iterator[None]:
    """The compiled functions as attributes of their owners: for this call only, since others use the same modules."""
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, _ in replaced:
            delattr(owner, name)


def _mode(case: Case, graphs: bool) -> str:
    if case.device.type != "cuda":
        return "default"
    return "max-autotune" if graphs else "max-autotune-no-cudagraphs"


def _problem(case: Case) -> str | None:
    if case.device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        return "torch.compile needs a C++ compiler on a CPU, and there is none"
    return None
