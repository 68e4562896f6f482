"""Choosing a backend: what auto takes, what the environment overrides, and that a named request never falls back."""

import pytest
import torch

from var_fast.errors import UserError
from var_fast.ops import backend as backend_module
from var_fast.ops.backend import FAST_BACKENDS, BackendUnavailable, choose_backend, explain


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv("VAR_FAST_BACKEND", raising=False)


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(backend_module, "native_problem", lambda: "the extension is not built")


def test_auto_takes_the_extension_on_the_cpu():
    assert choose_backend("sample_tokens", torch.zeros(1).device) == "native"
    assert explain("sample_tokens", "cpu")[0] == "native"


def test_auto_takes_the_reference_elsewhere():
    assert choose_backend("sample_tokens", "meta") == "reference"
    backend, reason = explain("sample_tokens", "cuda")
    assert backend == "reference"
    assert "native: implemented for cpu only" in reason


def test_auto_without_the_extension_says_why(not_built):
    assert choose_backend("sample_tokens", "cpu") == "reference"
    assert explain("sample_tokens", "cpu") == ("reference", "native: the extension is not built")


@pytest.mark.parametrize("op", FAST_BACKENDS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_reference_runs_every_operator_everywhere(op, device):
    assert choose_backend(op, device, requested="reference") == "reference"
    assert all(explain(op, device))


def test_a_named_backend_that_is_missing_raises(not_built):
    with pytest.raises(BackendUnavailable, match="sample_tokens: backend 'native' .* cpu: the extension is not built"):
        choose_backend("sample_tokens", "cpu", requested="native")


@pytest.mark.parametrize(
    ("op", "requested", "device", "why"),
    [
        ("scale_attention", "native", "cpu", "scale_attention has no native implementation"),
        ("sample_tokens", "triton", "cpu", "sample_tokens has no triton implementation"),
        ("sample_tokens", "native", "cuda", "implemented for cpu only"),
    ],
)
def test_a_named_backend_that_cannot_run_raises(op, requested, device, why):
    with pytest.raises(BackendUnavailable, match=f"{op}: backend '{requested}' .* on {device}: {why}"):
        choose_backend(op, device, requested=requested)


def test_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv("VAR_FAST_BACKEND", "reference")
    assert choose_backend("sample_tokens", "cpu") == "reference"
    assert choose_backend("sample_tokens", "cpu", requested="native") == "native"
    assert explain("sample_tokens", "cpu") == ("reference", "asked for by VAR_FAST_BACKEND")


def test_environment_naming_a_missing_backend_raises(monkeypatch):
    monkeypatch.setenv("VAR_FAST_BACKEND", "triton")
    with pytest.raises(BackendUnavailable, match="asked for by VAR_FAST_BACKEND"):
        choose_backend("sample_tokens", "cpu")


@pytest.mark.parametrize("origin", ["call", "environment"])
def test_unknown_name_raises(monkeypatch, origin):
    if origin == "environment":
        monkeypatch.setenv("VAR_FAST_BACKEND", "cutlass")
    with pytest.raises(UserError, match="backend is 'cutlass' .*expected one of auto, reference, triton, native"):
        choose_backend("sample_tokens", "cpu", "cutlass" if origin == "call" else "auto")


def test_what_wants_no_triton_kernel_is_left_to_the_reference(monkeypatch):
    monkeypatch.setenv("VAR_FAST_BACKEND", "triton")
    assert choose_backend("gelu", "cuda") == choose_backend("gelu", "cpu") == "reference"
    with pytest.raises(BackendUnavailable, match="gelu has no triton implementation"):
        choose_backend("gelu", "cuda", requested="triton")
