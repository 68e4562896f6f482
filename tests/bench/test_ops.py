"""The suite of operators: every operator is in it, right results pass its checks, wrong ones do not."""

from __future__ import annotations

import dataclasses
import os
import sys
import textwrap

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import var_fast.ops
from bench.case import CannotRun, Implementation, Stage, Wrong
from bench.ops.checks import check_all_close, check_close
from bench.ops.operator import operators
from bench.ops.pyramids import PATCH_NUMS, allowed_pairs
from bench.peers import flex, hmar, sdpa
from bench.peers.base import load_peer
from bench.suites.ops import MOST_SETS, as_implementation, backend_implementations, cases, reference_implementation
from var_fast.errors import UserError
from var_fast.ops.backend import FAST_BACKENDS

CPU = torch.device("cpu")


def small(name=None, dtype=torch.float32, cache_bytes=0):
    return list(cases(CPU, dtype, "small", name and [name], cache_bytes))


def forward(name):
    return small(name)[0]


def small_names():
    return [case.name for case in small()]


def run(case, implementation):
    """The result of a call and what it should be, of the first inputs."""
    return implementation.call(*case.inputs[0]), implementation.expected(*case.inputs[0])


def tensors(inputs):
    args, kwargs, upstream = inputs
    return [x for x in (*args, *kwargs.values(), *upstream) if isinstance(x, torch.Tensor)]


def test_every_operator_has_its_file_here():
    assert {operator.name for operator in operators()} == set(FAST_BACKENDS)
    for operator in operators():
        assert set(operator.shapes) == {"small", "quick", "full"}
        assert all(shape["B"] >= 1 for shapes in operator.shapes.values() for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_passes_its_own_check(dtype):
    found = small(dtype=dtype)
    assert sum(case.subject.backward for case in found) >= 6
    for case in found:
        case.check(*run(case, reference_implementation(case)))


@pytest.mark.parametrize("name", small_names())
def test_each_part_of_a_result_is_checked(name):
    case = next(case for case in small() if case.name == name)
    result, expected = run(case, reference_implementation(case))
    parts, layout = tree_flatten(result)
    for i, part in enumerate(parts):
        if part.is_floating_point():
            one_nan = part.clone()
            one_nan[(0,) * part.dim()] = torch.nan
            wrong = [part * 1.0001, one_nan, torch.full_like(part, torch.inf)]
        else:
            one_other, first = part.clone(), (0,) * part.dim()
            one_other[first] = one_other[first] - 1 if one_other[first] > 0 else 1
            wrong = [one_other, part.int(), part + 10**6]
        for changed in wrong:
            with pytest.raises(Wrong):
                case.check(tree_unflatten([*parts[:i], changed, *parts[i + 1 :]], layout), expected)


def test_close_means_relative_to_the_norm():
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    check_close("y", torch.tensor([3.0, 4.04]), expected, 0.0081)
    with pytest.raises(Wrong, match="y is off by 8.0e-03"):
        check_close("y", torch.tensor([3.0, 4.04]), expected, 0.0079)
    with pytest.raises(Wrong):
        check_close("y", torch.tensor([3.0, 4.0, 0.0]), expected, 1.0)
    zero = torch.zeros(2, dtype=torch.float64)
    check_close("y", zero.float(), zero, 1e-5)
    with pytest.raises(Wrong):
        check_close("y", expected, zero, 1e-5)
    with pytest.raises(Wrong, match="1 results, expected 2: q, k"):
        check_all_close(("q", "k"), (expected,), (expected, expected), 1.0)


def test_a_code_that_is_as_near_is_right_too():
    case = forward("codebook_search")
    (z, codebook), kwargs, upstream = case.inputs[0]
    codebook = torch.cat([codebook, codebook.flip(0)])  # every code twice
    implementation = reference_implementation(case)
    idx = implementation.call((z, codebook), kwargs, upstream)
    expected = implementation.expected((z, codebook), kwargs, upstream)
    case.check(len(codebook) - 1 - idx, expected)
    with pytest.raises(Wrong, match="not those of the nearest codes"):
        case.check(len(codebook) - 1 - (idx + 1) % 64, expected)


def test_either_way_from_a_tie_is_right_in_a_pyramid():
    case = forward("multiscale_quantize")
    (f, codebook, phi, patch_nums), _, _ = case.inputs[0]
    f = (4 * f).round()
    f = f - f.flip(2)  # its mean is 0 without rounding, so at the first scale a code is as near as its negative
    codebook = 2 * torch.nn.functional.normalize(codebook)
    codebook = torch.cat([codebook, -codebook.flip(0)])
    implementation = reference_implementation(case)
    idx, f_hat = implementation.call((f, codebook, phi, patch_nums), {}, [])
    flipped, other_f_hat = implementation.call((f, codebook.flip(0), phi, patch_nums), {}, [])
    other_idx = [len(codebook) - 1 - idx_Bl for idx_Bl in flipped]
    assert all((a != b).any() for a, b in zip(idx, other_idx, strict=True))  # the whole pyramid goes another way
    expected = implementation.expected((f, codebook, phi, patch_nums), {}, [])
    case.check((idx, f_hat), expected)
    case.check((other_idx, other_f_hat), expected)
    for mixed in ((other_idx[:1] + idx[1:], f_hat), (idx, other_f_hat)):
        with pytest.raises(Wrong):
            case.check(mixed, expected)


def test_work_of_adaln_modulate_by_hand():
    alone, both = small("adaln_modulate")
    # 2 x 30 x 64 maps of 15360 bytes, 2 x 64 rows of 512: x, scale, shift, y; then x, dy, dx, scale, dscale, dshift
    assert alone.work == [Stage(0, 2 * 15360 + 2 * 512)]
    assert both.work == [*alone.work, Stage(0, 3 * 15360 + 3 * 512)]
    assert small("adaln_modulate", torch.bfloat16)[0].work == [Stage(0, 15360 + 512)]


def test_work_of_scale_attention_by_hand():
    alone, both = small("scale_attention")
    # scales of 1, 4, 9 and 16 tokens see 1, 5, 14 and 30: 627 pairs; 2 images, 2 heads of 32; maps of 15360 bytes
    assert alone.work == [Stage(4 * 32 * 2 * 2 * 627, 4 * 15360)]
    assert both.work == [*alone.work, Stage(10 * 32 * 2 * 2 * 627, 8 * 15360)]


@pytest.mark.parametrize("L, percent", [(680, 62), (2240, 65)])
def test_allowed_pairs_are_those_of_the_mask(L, percent):
    assert allowed_pairs(L) == sdpa.scale_mask(PATCH_NUMS[L], CPU).sum()
    assert round(100 * allowed_pairs(L) / L**2) == percent


def test_rotated_inputs_exceed_the_cache_and_share_nothing():
    for case in small("residual_adaln_modulate", cache_bytes=2**17):
        sizes = [sum(x.nbytes for x in tensors(inputs)) for inputs in case.inputs]
        assert sum(sizes) > 2 * 2**17 >= sum(sizes[:-1])
        pointers = [x.data_ptr() for inputs in case.inputs for x in tensors(inputs)]
        assert len(set(pointers)) == len(pointers)
        assert not torch.equal(case.inputs[0][0][0], case.inputs[1][0][0])
    assert [len(case.inputs) for case in small("qk_norm")] == [2, 2]
    assert [len(case.inputs) for case in small("qk_norm", cache_bytes=2**40)] == [MOST_SETS, MOST_SETS]


def test_a_call_leaves_its_inputs_as_they_were():
    for case in small():
        before = [x.clone() for x in tensors(case.inputs[0])]
        reference_implementation(case).call(*case.inputs[0])
        for x, copy in zip(tensors(case.inputs[0]), before, strict=True):
            assert torch.equal(x, copy) and not x.requires_grad, case.name


def test_float64_is_computed_once_for_all_implementations(monkeypatch):
    calls = []

    def counted(x, *args):
        calls.append(x.dtype)
        return reference(x, *args)

    case, reference = forward("adaln_modulate"), var_fast.ops.adaln_modulate_reference
    monkeypatch.setattr(var_fast.ops, "adaln_modulate_reference", counted)
    for implementation in (reference_implementation(case), as_implementation(case, reference)):
        implementation.expected(*case.inputs[0])
    assert calls == [torch.float64]
    implementation.expected(*case.inputs[1])
    assert calls == [torch.float64] * 2


def test_a_new_backend_appears_by_being_registered(monkeypatch):
    seen = []

    def operator(*args, backend):
        seen.append(backend)
        return var_fast.ops.adaln_modulate_reference(*args)

    monkeypatch.setattr(var_fast.ops, "adaln_modulate", operator)
    monkeypatch.setitem(FAST_BACKENDS, "adaln_modulate", {})
    assert load_peer("var_fast").ops(forward("adaln_modulate")) == {}
    monkeypatch.setitem(FAST_BACKENDS, "adaln_modulate", {"triton": ("cpu", "cuda"), "native": ("cuda",)})
    for case in small("adaln_modulate"):
        found = load_peer("var_fast").ops(case)
        assert list(found) == ["triton", "native"]
        case.check(*run(case, found["triton"]))
        assert isinstance(found["native"], CannotRun) and "cuda only" in str(found["native"])
    assert seen == ["triton", "triton"]


def test_native_sample_tokens_is_listed():
    case = forward("sample_tokens")
    native = backend_implementations(case)["native"]
    if isinstance(native, Implementation):
        case.check(*run(case, native))
    else:
        assert "not built" in str(native)


def test_names():
    assert [case.name for case in small("adaln_modulate")] == [
        "adaln_modulate forward 2x30x64",
        "adaln_modulate forward + backward 2x30x64",
    ]
    assert forward("pyramid_update").name == "pyramid_update forward 2x8x4x4x64 pn=2 pn_next=3"
    with pytest.raises(UserError, match="no operator 'adaln', expected one of adaln_modulate"):
        cases(CPU, torch.float32, "small", ["adaln"])


def test_only_cases_whose_name_contains_a_text():
    chosen = list(cases(CPU, torch.float32, "small", only=["adaln_modulate forward 2x", "pyramid"]))
    assert [case.name for case in chosen] == [
        "adaln_modulate forward 2x30x64",
        "pyramid_update forward 2x8x4x4x64 pn=2 pn_next=3",
        "residual_adaln_modulate forward 2x30x64",
    ]


def test_attention_peers_have_nothing_for_other_operators(checkout):
    for peer in (sdpa.Peer(), flex.Peer(), hmar.Peer(checkout)):
        assert peer.ops(forward("qk_norm")) == {}


def test_sdpa_does_what_the_reference_does():
    for case in small("scale_attention"):
        case.check(*run(case, sdpa.Peer().ops(case)["sdpa"]))


def test_flex_says_what_it_needs(monkeypatch):
    alone, both = small("scale_attention")
    assert "no backward on a CPU" in str(flex.Peer().ops(both)["flex"])
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert "C++ compiler" in str(flex.Peer().ops(alone)["flex"])


@pytest.fixture
def checkout(tmp_path):
    """What the peer `hmar` uses of a checkout, in plain PyTorch."""
    (tmp_path / "attn").mkdir()
    (tmp_path / "attn" / "__init__.py").write_text("")
    (tmp_path / "attn" / "block_sparse_attn_interface.py").write_text(
        textwrap.dedent("""
        import os
        import torch
        TUNED = os.environ.get("TRITON_AUTO_TUNING")
        class BlockSparseAttention:
            def __init__(self, block_sizes, device, sparsity_pattern):
                assert sparsity_pattern == "block_causal"
                self.scale = torch.cat([torch.full((n,), i) for i, n in enumerate(block_sizes)])
            def __call__(self, q, k, v, sm_scale):
                scores = (q @ k.mT * sm_scale).masked_fill(self.scale[:, None] < self.scale, float("-inf"))
                return scores.softmax(-1) @ v
        """)
    )
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "attn"]:
        del sys.modules[name]


def test_hmar_wants_a_checkout(tmp_path):
    with pytest.raises(UserError, match="expected a checkout of the public HMAR code"):
        load_peer(f"hmar={tmp_path}")


def test_hmar_says_what_it_needs(checkout):
    peer, case = hmar.Peer(checkout), forward("scale_attention")
    assert "CUDA" in str(peer.ops(case)["hmar"])
    on_gpu = dataclasses.replace(case, device=torch.device("cuda"))
    assert "float16" in str(peer.ops(on_gpu)["hmar"])
    (checkout / "attn" / "__init__.py").write_text("raise RuntimeError('no driver')")
    in_half = dataclasses.replace(on_gpu, dtype=torch.float16)
    assert "does not import: RuntimeError: no driver" in str(peer.ops(in_half)["hmar"])


def test_hmar_is_called_as_its_interface_asks(checkout):
    path, tuning = list(sys.path), os.environ.get("TRITON_AUTO_TUNING")
    for case in small("scale_attention"):
        # on the CPU, in float32, against the stand-in
        in_half = dataclasses.replace(case, device=torch.device("cuda"), dtype=torch.float16)
        case.check(*run(case, hmar.Peer(checkout).ops(in_half)["hmar"]))
    assert sys.path == path and os.environ.get("TRITON_AUTO_TUNING") == tuning
    assert sys.modules["attn.block_sparse_attn_interface"].TUNED == "1"
