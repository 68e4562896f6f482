"""For all tests: Triton's interpreter where there is no GPU, and the `gpu` tests skipped there."""

import os

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
