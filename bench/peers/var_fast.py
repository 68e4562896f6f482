"""What this project is: the modules as users get them, and every fast backend of every operator.

bench/run.py takes VAR_FAST_BACKEND out of the environment, so that each operator runs what "auto" chooses.
"""

from __future__ import annotations

from bench.case import Case, Implementation, Implementations
from bench.peers import base
from bench.suites import modules
from bench.suites.ops import backend_implementations


class Peer(base.Peer):
    def sample(self, case: Case) -> Implementations:
        return {"var_fast": Implementation(modules.sample(case))}

    def train(self, case: Case) -> Implementations:
        return {"var_fast": Implementation(modules.train(case))}

    def tokenize(self, case: Case) -> Implementations:
        return {"var_fast": Implementation(modules.tokenize(case))}

    def ops(self, case: Case) -> Implementations:
        return backend_implementations(case)
