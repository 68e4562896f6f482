"""What all kernel tests need: the Triton kernels run in the interpreter on a CPU, for real on a GPU."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install -e '.[test]' brings it)")


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one, else the CPU with Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    assert os.environ.get("TRITON_INTERPRET") == "1"  # set by tests/conftest.py
    return torch.device("cpu")
