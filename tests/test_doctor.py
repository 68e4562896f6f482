"""var-fast doctor: what it reports, and that it tells a damaged demo model from a complete one."""

import io
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import var_fast
from var_fast import doctor
from var_fast.ops.backend import FAST_BACKENDS, LOOPS


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A demo directory with complete files; doctor looks there."""
    directory = tmp_path / "demo"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    for name in ("tokenizer", "transformer"):
        save_file({"weight": torch.zeros(64)}, directory / f"{name}.safetensors")
    monkeypatch.setattr(var_fast, "__file__", str(tmp_path / "__init__.py"))
    return directory


def test_report_is_plain_data_and_names_every_operator():
    found = json.loads(json.dumps(doctor.report()))
    assert set(found["operators"]) == {*LOOPS, *FAST_BACKENDS}
    assert found["operators"]["sample_tokens"]["cpu"]["backend"] == "native"
    assert found["versions"]["torch"] == torch.__version__
    assert found["extension"]["built"] and found["extension"]["file"].endswith(".so")


def test_complete_demo(demo):
    assert doctor.report()["demo"] == {
        "directory": str(demo),
        "files": {name: "complete, 0.0 MB" for name in doctor.DEMO_FILES},
        "complete": True,
    }


def test_missing_file(demo):
    (demo / "config.json").unlink()
    found = doctor.report()["demo"]
    assert found["files"]["config.json"] == "missing"
    assert not found["complete"]


def test_truncated_file(demo):
    path = demo / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    found = doctor.report()["demo"]
    assert found["files"]["transformer.safetensors"].startswith("damaged: ")
    assert not found["complete"]


def printed() -> str:
    console = Console(file=io.StringIO(), width=200)
    doctor.print_report(console)
    return console.file.getvalue()


@pytest.mark.parametrize("nvcc", [None, "/opt/cuda/bin/nvcc"])
def test_nvcc(monkeypatch, nvcc):
    monkeypatch.setattr(shutil, "which", lambda program: nvcc)
    monkeypatch.setattr(doctor, "cuda_problem", lambda: "built without CUDA")
    expected = f"{nvcc}: built for the CPU only" if nvcc else "not found: var_fast builds for the CPU only"
    assert expected in printed()
    monkeypatch.setattr(doctor, "cuda_problem", lambda: None)
    assert "the extension holds the CUDA operators" in printed()


def test_an_override_that_cannot_run_is_shown(monkeypatch):
    monkeypatch.setenv("VAR_FAST_BACKEND", "triton")
    assert "none (sample_tokens: backend 'triton' (asked for by VAR_FAST_BACKEND) cannot run" in printed()


def test_extension_not_built(monkeypatch):
    monkeypatch.setattr(doctor, "native_problem", lambda: "not built; run: pip install -e .")
    assert "not built; run: pip install -e ." in printed()
    assert not doctor.report()["extension"]["built"]


def test_triton_not_installed(monkeypatch):
    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", version)
    assert "not installed (no operator of this version uses it)" in printed()


def test_report_needs_neither_rich_nor_safetensors(demo, monkeypatch):
    for package in ("rich", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)
    found = doctor.report()["demo"]
    assert found["files"]["transformer.safetensors"] == "not checked: safetensors is not installed"
    assert not found["complete"]
