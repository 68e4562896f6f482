"""What setup.py says when something it needs is missing: one line, before anything is built or downloaded. And the
environment that make uses."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
import setuptools

import var_fast

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
        monkeypatch.setitem(setup_py["check_torch"].__globals__, "inherited_paths", list)

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


def test_the_build_needs_headers_of_torch(setup_py, environment):
    environment("setuptools", "pybind11", "torch")  # a torch without headers
    build = setup_py["BuildExtension"](setuptools.dist.Distribution())
    with pytest.raises(SystemExit) as stop:
        build.build_extensions()
    assert "\n" not in stop.value.code
    assert "needs torch's headers" in stop.value.code and "pip install --no-build-isolation" in stop.value.code


def test_build_environment_without_pip(tmp_path):
    """What uv and build make: a virtual environment with the build's needs only; its base interpreter may have pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True, timeout=60)
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    folders = [Path(package.__file__).parent for package in (setuptools, pybind11)]
    for folder in [*folders, folders[0].with_name("_distutils_hack")]:
        (packages / folder.name).symlink_to(folder)
    asked = subprocess.run(
        [tmp_path / "bin" / "python", "-s", "setup.py", "--version"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.split()[-1] == var_fast.__version__


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


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("active", "used"),
    [
        ({"VIRTUAL_ENV": "/e/venv"}, "/e/venv"),
        ({"CONDA_PREFIX": "/e/conda"}, "/e/conda"),
        ({"VIRTUAL_ENV": "/e/venv", "CONDA_PREFIX": "/e/conda"}, "/e/venv"),
        ({}, None),
    ],
)
def test_make_uses_the_active_environment(active, used, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.py", "pyproject.toml"):
        (tmp_path / name).touch()
    base = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "MAKEFLAGS", "MAKELEVEL")}
    run = subprocess.run(
        ["make", "-n", "demo"], cwd=tmp_path, env=base | active, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert f"{used or tmp_path / '.venv'}/bin/var-fast sample --model demo --labels " in run.stdout
    assert ("-m venv" in run.stdout) == (not active)


@pytest.mark.parametrize(
    "version, wanted, built",
    [
        ("cuda: Optional[str] = '13.0'", None, True),
        ("cuda = '12.8'", None, True),
        ("cuda: Optional[str] = None", None, False),
        ("cuda: Optional[str] = None", "1", True),
        ("cuda: Optional[str] = '13.0'", "0", False),
    ],
)
def test_cuda_operators_are_built_with_torchs_cuda(setup_py, monkeypatch, tmp_path, version, wanted, built):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{version}\nhip: Optional[str] = '6'\n")
    names = setup_py["find_nvcc"].__globals__
    monkeypatch.setitem(names, "environment_paths", lambda: [str(tmp_path)])
    monkeypatch.setattr(shutil, "which", lambda program: f"/found/{program}")
    monkeypatch.delenv("VAR_FAST_CUDA", raising=False)
    if wanted is not None:
        monkeypatch.setenv("VAR_FAST_CUDA", wanted)
    assert (setup_py["find_nvcc"]() is not None) is built


def test_cuda_asked_for_without_nvcc(setup_py, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setenv("VAR_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc is neither in .*/bin nor on the PATH"):
        setup_py["find_nvcc"]()
    monkeypatch.setenv("VAR_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="VAR_FAST_CUDA is 'yes', expected"):
        setup_py["find_nvcc"]()


def test_gpu_generations_that_an_old_nvcc_knows(setup_py, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80\necho compute_90\n")
    nvcc.chmod(0o755)
    assert setup_py["gpu_architectures"](str(nvcc)) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
