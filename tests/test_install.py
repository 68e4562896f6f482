"""What setup.py says when something it needs is missing: one line, before anything is built or downloaded."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, loaded without running setup()."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path("setup.py")


@pytest.fixture
def environment(setup_py, monkeypatch, tmp_path):
    """Make an environment that holds the named packages and nothing else."""

    def holding(*names):
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").touch()
        monkeypatch.setitem(setup_py["check_torch"].__globals__, "environment_paths", lambda: [str(tmp_path)])

    return holding


def test_torch_missing(setup_py, environment):
    environment("pip")
    with pytest.raises(SystemExit) as stop:
        setup_py["check_torch"]()
    message = stop.value.code
    assert "\n" not in message
    assert message.startswith("var_fast: torch is not installed in this environment; run: pip install torch==")


def test_torch_present(setup_py, environment):
    environment("pip", "torch")
    setup_py["check_torch"]()


def test_temporary_build_environment_of_another_installer(setup_py, environment):
    environment("setuptools", "pybind11")
    setup_py["check_torch"]()


def test_torch_is_found_where_pip_hides_it(setup_py, monkeypatch):
    """Build isolation takes the environment's packages off sys.path."""
    import torch

    site_packages = str(Path(torch.__file__).parents[1])
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != site_packages])
    assert site_packages in setup_py["environment_paths"]()


@pytest.mark.parametrize("variables", [{"CC": "/no/such/cc", "CXX": "/no/such/c++"}, {"PATH": "/no/such/directory"}])
def test_compiler_missing(variables, tmp_path):
    base = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"],
        cwd=ROOT,
        env=base | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert build.returncode != 0
    assert build.stderr.strip().splitlines()[-1].startswith("var_fast: no C++ compiler found (looked for ")
    assert "Traceback" not in build.stderr
    assert not list(tmp_path.iterdir())
