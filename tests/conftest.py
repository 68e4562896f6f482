"""For all tests: Triton's interpreter where there is no GPU, and the `gpu` tests skipped there; common fixtures."""

import os
from pathlib import Path

import pytest
import torch

# read when a kernel is decorated, so set before any kernel module is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module")
def one_thread():
    """Threads cost more than they bring to a tiny model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Directory of the commands' tiny model."""
    from tests.cli_util import save_tiny_model

    directory = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_model(directory)
    return directory


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
