"""Peers are found by their files; each does what the reference does."""

import sys
import textwrap

import pytest
import torch
from torch import nn

import bench.peers
from bench import models as models_module
from bench.case import Wrong
from bench.measure import Method, Seconds, measure
from bench.models import build
from bench.peers import published
from bench.peers.base import load_peer, peer_names
from bench.suites import sample, tokenize, train
from var_fast.errors import UserError

CPU = torch.device("cpu")
RATES = {"flops_per_s": {"float32": 1e11}, "copy_bytes_per_s": 1e10}


@pytest.fixture(autouse=True)
def one_thread():
    # two that wait for each other beside other work take many times as long
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo():
    return build("demo", CPU)


def test_the_peers_of_the_issue_are_there():
    names = {"compile", "flex", "hmar", "published", "reference", "sdpa", "var_fast"}
    assert set(peer_names()) == names


def test_a_new_file_is_a_new_peer(tmp_path, monkeypatch):
    (tmp_path / "invented.py").write_text(
        textwrap.dedent("""
        from bench.peers import base
        class Peer(base.Peer):
            pass
        """)
    )
    monkeypatch.setattr(bench.peers, "__path__", [*bench.peers.__path__, str(tmp_path)])
    try:
        assert "invented" in peer_names()
        assert load_peer("invented").sample(None) == {}
    finally:
        sys.modules.pop("bench.peers.invented", None)


def groups(demo):
    yield sample.cases(demo, CPU, [torch.float32], 2)
    yield train.cases(demo, CPU, [torch.float32], 2)
    yield tokenize.cases(demo, CPU, [torch.float32], 2, decode=False)
    yield tokenize.cases(demo, CPU, [torch.float32], 2, decode=True)


def test_var_fast_passes_every_check_of_the_model_suites(demo):
    for cases in groups(demo):
        rows = []
        peers = [load_peer("reference"), load_peer("var_fast")]
        measure(cases, peers, RATES, Method(0.0, 2), Seconds(), rows)
        assert [row.implementation for row in rows] == ["reference", "var_fast"]
        assert all(row.skipped is None and row.median_s > 0 for row in rows), rows


def test_half_types_pass_too_and_train_has_no_float16(demo):
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    assert [case.dtype for case in train.cases(demo, CPU, dtypes, 1)] == dtypes[:2]
    for cases in (sample.cases(demo, CPU, dtypes[:2], 1), train.cases(demo, CPU, dtypes[:2], 1)):
        rows = []
        method = Method(0.0, 2, reference_in_half=False)
        measure(cases, [load_peer("reference"), load_peer("var_fast")], RATES, method, Seconds(), rows)
        assert len(rows) == 3 and all(row.skipped is None for row in rows), rows


def test_a_changed_weight_is_found_out(demo):
    class Broken(type(load_peer("var_fast"))):
        def sample(self, case):
            return self._broken(super().sample(case))

        def train(self, case):
            return self._broken(super().train(case))

        def tokenize(self, case):
            return self._broken(super().tokenize(case))

        def _broken(self, implementations):
            call = implementations["var_fast"].call
            weights = [demo.var.blocks[0].ffn.fc1.weight, demo.vae.encoder.conv_in.weight]

            def run(*inputs):
                before = [weight.detach().clone() for weight in weights]
                try:
                    for weight in weights:
                        weight.data.mul_(1.2)
                    return call(*inputs)
                finally:
                    for weight, value in zip(weights, before):
                        weight.data.copy_(value)

            return {"broken": type(implementations["var_fast"])(run)}

    for cases in groups(demo):
        rows = []
        measure(cases, [load_peer("reference"), Broken()], RATES, Method(0.0, 2), Seconds(), rows)
        assert rows[1].implementation == "broken" and "differ" in rows[1].skipped or "reference's" in rows[1].skipped
        assert rows[1].median_s is None


def test_published_names_what_it_does_not_have(demo, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "var.py").write_text("")
    peer = load_peer(f"published={tmp_path}")
    case = sample.cases(demo, CPU, [torch.float32], 1)[0]
    assert str(peer.sample(case)["published"]) == "the published code has no model 'demo'"
    case = sample.cases(demo, CPU, [torch.bfloat16], 1)[0]
    assert set(peer.sample(case)) == {"published-autocast"}


def test_importing_published_code_leaves_torch_as_it_was(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "var.py").write_text("")
    (tmp_path / "models" / "__init__.py").write_text(
        textwrap.dedent("""
        from torch import nn
        def build_vae_var(device, **settings):
            print("a banner")
            for layer in (nn.Linear, nn.BatchNorm2d, nn.Conv2d):
                setattr(layer, "reset_parameters", lambda self: None)
            return "vae", nn.Linear(2, 2)
        """)
    )
    before = {name: nn.__dict__[name].__dict__.get("reset_parameters") for name in ("Linear", "BatchNorm2d", "Conv2d")}
    path, modules = list(sys.path), set(sys.modules)
    try:
        published.Peer(tmp_path)._import(CPU, {})
        after = {name: nn.__dict__[name].__dict__.get("reset_parameters") for name in before}
        assert after == before and sys.path == path
    finally:
        for name in set(sys.modules) - modules:
            del sys.modules[name]


def test_load_peer_wants_what_it_needs():
    with pytest.raises(UserError, match="expected one of compile"):
        load_peer("nothing")


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["skipped block", "no attention", "no FFN"])
def test_random_weights_let_no_block_go_missing(broken, monkeypatch):
    # gates of 1e-5 and a head of 0.02, with which training begins, would hide all of these
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(models_module, "published_settings", lambda name: small_settings())
        models = build("d16", CPU)

    class Broken(type(load_peer("var_fast"))):
        def sample(self, case):
            return self._broken(super().sample(case))

        def train(self, case):
            return self._broken(super().train(case))

        def _broken(self, implementations):
            call, block = implementations["var_fast"].call, models.var.blocks[1]

            def run(*inputs):
                with monkeypatch.context() as patch:
                    if broken == "skipped block":
                        patch.setattr(block, "forward_modulated", lambda x, *_, pending=None, **__: (x, pending))
                    elif broken == "no attention":
                        patch.setattr(block.attn, "forward", lambda x, *_, **__: torch.zeros_like(x))
                    else:
                        patch.setattr(block.ffn, "forward", torch.zeros_like)
                    return call(*inputs)

            return {"broken": type(implementations["var_fast"])(run)}

    # 240 tokens in all: of the 30 of one image it may be that none is drawn differently
    for cases in (sample.cases(models, CPU, [torch.float32], 8), train.cases(models, CPU, [torch.float32], 8)):
        rows = []
        measure(
            cases, [load_peer("reference"), load_peer("var_fast"), Broken()], RATES, Method(0.0, 2), Seconds(), rows
        )
        reference, ours, wrong = rows
        assert ours.skipped is None and wrong.implementation == "broken"
        assert wrong.median_s is None and wrong.skipped, (broken, cases[0].suite)


def small_settings():
    return dict(depth=4, patch_nums=(1, 2, 3, 4), num_classes=10, attn_l2_norm=True, ch=32, V=256)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(demo):
    case = train.cases(demo, CPU, [torch.float32], 1)[0]
    step = train.step(demo.var, lambda *inputs: demo.var.loss(*inputs)[0] * float("nan"))
    before = demo.var.head.weight.detach().clone()
    with pytest.raises(Wrong, match="not finite"):
        step(*case.inputs[0])
    assert torch.equal(demo.var.head.weight, before)
    assert all(p.grad is None for p in demo.var.parameters())
