"""The published code, from a checkout of it: as it is, and under the autocast that its notebook recommends."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from bench.backends import use_backend
from bench.case import CannotRun, Case, Implementation, Implementations
from bench.models import PUBLISHED, Models, published_settings
from bench.peers import base
from bench.suites.train import step
from var_fast.errors import UserError


class Peer(base.Peer):
    path_help = "a checkout of the public VAR code, with models/var.py in it"

    def __init__(self, path: Path):
        super().__init__(path)
        # at every training step, about names of torch that it uses
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"models\.")
        if not (path / "models" / "var.py").is_file():
            raise UserError(f"--peer published={path}: expected {self.path_help}")
        # of the last case: ours, theirs. Weakly, for a model that is no longer measured should leave the memory
        self._models: tuple[weakref.ref[Models], nn.Module, nn.Module] | None = None

    def begin(self) -> None:
        if self._models is not None and self._models[0]() is None:
            self._models = None

    def sample(self, case: Case) -> Implementations:
        subject, ours = case.subject, case.subject.models.var

        def images(var, labels, seeds):
            var.eval()
            return var.autoregressive_infer_cfg(
                len(labels), labels, int(seeds[0]), cfg=subject.cfg, top_k=subject.top_k, top_p=subject.top_p
            )

        def expected(labels, seeds):
            # drawn in the published order: Sampler's draws are others
            with use_backend("reference"):
                return images(ours, labels, seeds)

        return self._implementations(case, lambda vae, var, cast: cast(lambda *inputs: images(var, *inputs)), expected)

    def train(self, case: Case) -> Implementations:
        def build(vae, var, cast):
            def loss(label_B, x_BLCv_wo_first_l, target_BL):
                var.train()
                logits_BLV = var(label_B, x_BLCv_wo_first_l)
                return F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten())

            return step(var, cast(loss))

        # not in float16, which would need its loss scaled
        return self._implementations(case, build, half=case.dtype)

    def tokenize(self, case: Case) -> Implementations:
        def build(vae, var, cast):
            def run(images):
                if case.subject.decode:
                    return vae.img_to_reconstructed_img(images, last_one=True)
                return vae.img_to_idxBl(images)

            return cast(torch.no_grad()(run))

        return self._implementations(case, build)

    def _implementations(self, case: Case, build, expected=None, half: torch.dtype | None = None) -> Implementations:
        """`published` for float32; for a half type `published-autocast`, in the notebook's type unless `half` is
        given."""
        if case.dtype == torch.float32:
            name, dtype, cast = "published", torch.float32, lambda function: function
        else:
            name = "published-autocast"
            dtype = half or (torch.float16 if case.device.type == "cuda" else torch.bfloat16)
            cast = torch.autocast(case.device.type, dtype=dtype)
        try:
            call = build(*self._build(case), cast)
        except CannotRun as reason:
            return {name: reason}
        # what a half type makes is compared as a whole, for which the reference's own images do
        return {name: Implementation(call, expected if dtype == torch.float32 else None, dtype)}

    def _build(self, case: Case) -> tuple[nn.Module, nn.Module]:
        """The published models with the weights (the same memory) of the case's."""
        ours: Models = case.subject.models
        if self._models is None or self._models[0]() is not ours:
            self._models = None
            if ours.name not in PUBLISHED:
                raise CannotRun(f"the published code has no model {ours.name!r}")
            vae, var = self._import(case.device, published_settings(ours.name))
            vae.load_state_dict(ours.vae.state_dict(), assign=True)
            var.load_state_dict(ours.var.state_dict(), assign=True)
            var.cond_drop_rate = 0.0
            for block in var.blocks:
                block.drop_path = nn.Identity()
            self._models = weakref.ref(ours), vae.eval(), var.eval()
        return self._models[1:]

    def _import(self, device: torch.device, settings: dict) -> tuple[nn.Module, nn.Module]:
        try:
            # without what it prints
            with base.on_path(self.path), contextlib.redirect_stdout(io.StringIO()), _initialisation_kept():
                return importlib.import_module("models").build_vae_var(device=device, **settings)
        except ImportError as error:
            raise CannotRun(f"the published code does not import: {error}") from error


@contextlib.contextmanager
def _initialisation_kept() -> Iterator[None]:
    """Building the published models switches off the initialisation of torch.nn's layers for the whole process."""
    layers = (nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm)
    layers += (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
    own = {layer: layer.__dict__.get("reset_parameters") for layer in layers}
    try:
        yield
    finally:
        for layer, function in own.items():
            if function is not None:
                layer.reset_parameters = function
            elif "reset_parameters" in layer.__dict__:
                del layer.reset_parameters
