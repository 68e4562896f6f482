"""The peer that defines the results: our modules with every operator on its plain PyTorch reference."""

from __future__ import annotations

from bench.backends import use_backend
from bench.case import Case, Implementation, Implementations
from bench.peers import base
from bench.suites import modules
from bench.suites.ops import reference_implementation


class Peer(base.Peer):
    def sample(self, case: Case) -> Implementations:
        return self._with_references(modules.sample(case))

    def train(self, case: Case) -> Implementations:
        return self._with_references(modules.train(case))

    def tokenize(self, case: Case) -> Implementations:
        return self._with_references(modules.tokenize(case))

    def ops(self, case: Case) -> Implementations:
        return {"reference": reference_implementation(case)}

    def _with_references(self, call) -> Implementations:
        def run(*inputs):
            with use_backend("reference"):
                return call(*inputs)

        return {"reference": Implementation(run)}
