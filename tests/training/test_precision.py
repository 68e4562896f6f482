"""Which number types a device trains slowly in."""

import pytest
import torch

from var_fast.training.precision import lacks_products

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "capabilities, slow",
    [
        ({"avx512_bf16": False, "avx512_fp16": False}, {"bfloat16", "float16"}),
        ({"avx512_bf16": True, "avx512_fp16": False}, {"float16"}),
        ({"avx512_bf16": True, "avx512_fp16": True}, set()),
        ({"architecture": "aarch64"}, set()),  # not known
    ],
)
def test_types_without_products_on_this_cpu(monkeypatch, capabilities, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    types = ("float32", "bfloat16", "float16")
    assert {name for name in types if lacks_products(name, CPU)} == slow
    assert not any(lacks_products(name, torch.device("cuda")) for name in types)


def test_a_torch_that_does_not_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not lacks_products("float16", CPU)
