"""The Triton kernel of codebook_search against a search in float64: the same indices, not just codes about as near."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.errors import UserError
from var_fast.ops import codebook_search
from var_fast.ops.backend import BackendUnavailable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel():
    from var_fast.kernels import codebook_search as kernel

    return kernel


def make(N, V, C, seed=0, device=DEVICE):
    """Vectors and codes of many lengths."""
    g = torch.Generator().manual_seed(seed)
    z_NC, codebook_VC = (torch.randn(n, C, generator=g) * torch.rand(n, 1, generator=g) for n in (N, V))
    return z_NC.to(device), codebook_VC.to(device)


def distances(z_NC, codebook_VC, cosine):
    z, codebook = z_NC.double(), codebook_VC.double()
    if cosine:
        return -F.normalize(z, dim=-1) @ F.normalize(codebook, dim=-1).T
    return torch.cdist(z, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()


def check(idx_N, z_NC, codebook_VC, cosine):
    """Nearest to the rounding of float64, and the first of equal codes."""
    assert idx_N.dtype == torch.int64 and idx_N.shape == z_NC.shape[:1]
    for z, idx in zip(z_NC.split(4096), idx_N.split(4096)):
        distance_NV = distances(z, codebook_VC, cosine)
        chosen_N = distance_NV.gather(1, idx[:, None]).squeeze(1)
        assert (chosen_N <= distance_NV.min(1).values + 1e-13 * (1 + z.double().square().sum(1))).all()
        first_of_equals_V = (
            (codebook_VC[:, None] == codebook_VC[None]).all(-1).int().argmax(1) if len(idx) < 99 else None
        )
        if first_of_equals_V is not None:
            assert torch.equal(first_of_equals_V[idx], idx)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 70),
    st.integers(1, 600),
    st.sampled_from([1, 8, 16, 20, 32, 64]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 2**16),
)
def test_any_shape(N, V, C, cosine, dtype, seed):
    z_NC, codebook_VC = (t.to(dtype) for t in make(N, V, C, seed))
    check(codebook_search(z_NC, codebook_VC, cosine, backend="triton"), z_NC, codebook_VC, cosine)


@pytest.mark.parametrize("few", [0, 4096], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("cosine", [False, True])
def test_halves_leave_no_wrong_code(kernel, monkeypatch, few, cosine):
    # codes in groups closer together than the first pass can tell apart, but not float64
    monkeypatch.setattr(kernel, "FEW", few)
    z_NC, codebook_VC = make(70, 32, 32)
    # 16 of a kind: two of them in a lane, or all, as 32 or 256 codes are a tile
    codebook_VC = codebook_VC.repeat(16, 1)
    codebook_VC = codebook_VC + 3e-7 * torch.randn(codebook_VC.shape).to(codebook_VC)
    half = torch.float16 if DEVICE == "cpu" else None
    idx_N = kernel.search(z_NC, kernel.prepare(codebook_VC, cosine, half), cosine)
    check(idx_N, z_NC, codebook_VC, cosine)
    assert len(idx_N.unique()) > 20


def test_second_halves_count(kernel):
    # among codes so close to each other the first halves alone would often choose another
    z_NC, codebook_VC = make(100, 30, 16)
    codebook_VC = codebook_VC.repeat(20, 1) + 3e-4 * torch.randn(600, 16).to(codebook_VC)
    half = torch.float16 if DEVICE == "cpu" else None
    check(kernel.search(z_NC, kernel.prepare(codebook_VC, False, half), False), z_NC, codebook_VC, False)
    high_z, high_codebook = (t.to(half or torch.bfloat16).float() for t in (z_NC, codebook_VC))
    score_NV = codebook_VC.square().sum(1) / 2 - high_z @ high_codebook.T
    assert (score_NV.argmin(1) != distances(z_NC, codebook_VC, False).argmin(1)).any()


@pytest.mark.parametrize("copies", [2, 300], ids=["in other lanes", "in the same lane"])
@pytest.mark.parametrize("cosine", [False, True])
def test_lowest_index_wins_a_tie(copies, cosine):
    z_NC, codebook_VC = make(20, 5, 8)
    # the copies of one code lie side by side
    idx_N = codebook_search(z_NC, codebook_VC.repeat_interleave(copies, 0), cosine, backend="triton")
    assert torch.equal(idx_N, copies * distances(z_NC, codebook_VC, cosine).argmin(1))
    assert (codebook_search(z_NC, torch.zeros_like(codebook_VC), cosine, backend="triton") == 0).all()


@pytest.mark.parametrize("C", [16, 32, 64])
def test_the_bound_of_the_first_pass_holds(kernel, C):
    z_NC, codebook_VC = make(200, 300, C, device="cpu")
    halves = []
    for t in (z_NC, codebook_VC):
        high = t.bfloat16()
        halves += [high.double(), (t - high.float()).bfloat16().double()]
    z_high, z_low, e_high, e_low = halves
    approximate_NV = z_high @ e_high.T + z_high @ e_low.T + z_low @ e_high.T
    error_NV = (approximate_NV - z_NC.double() @ codebook_VC.double().T).abs()
    lengths_NV = z_NC.double().norm(dim=1)[:, None] * codebook_VC.double().norm(dim=1)
    assert (error_NV <= 3.03 * 2**-18 * lengths_NV).all()
    # what the kernel allows for: that, and float32 sums of 3 C products that are cut off, not rounded
    allowed_NV = kernel._error.fn(z_NC.double().norm(dim=1)[:, None], codebook_VC.double().norm(dim=1), C)
    assert (allowed_NV >= 1.01 * (3.03 * 2**-18 + 4 * C * 2**-23) * lengths_NV).all()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("size", [1e-25, 1e-3, 1e4, 1e15])
def test_lengths_far_from_one(size, cosine):
    z_NC, codebook_VC = (t * size for t in make(9, 50, 8))
    expected_N = distances(z_NC, codebook_VC, cosine).argmin(1)
    assert torch.equal(codebook_search(z_NC, codebook_VC, cosine, backend="triton"), expected_N)


def test_cosine_ignores_the_length_of_vectors_and_codes():
    z_NC, codebook_VC = make(30, 60, 16)
    idx_N = codebook_search(z_NC, codebook_VC, True, backend="triton")
    other_N = codebook_search(1e-4 * z_NC, codebook_VC * torch.rand(60, 1).to(z_NC).add(0.1), True, backend="triton")
    assert torch.equal(idx_N, other_N)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
def test_vectors_that_are_not_finite_get_some_code():
    z_NC, codebook_VC = make(4, 40, 8)
    z_NC[1], z_NC[2] = torch.nan, torch.inf
    idx_N = codebook_search(z_NC, codebook_VC, backend="triton")
    assert ((idx_N >= 0) & (idx_N < 40)).all()
    check(idx_N[[0, 3]], z_NC[[0, 3]], codebook_VC, False)


def test_inputs_that_are_not_contiguous():
    z_NC, codebook_VC = make(60, 33, 40)
    z_NC, codebook_VC = z_NC.T[1::2].T, codebook_VC.T[1::2].contiguous().T
    assert not z_NC.is_contiguous() and not codebook_VC.is_contiguous()
    check(codebook_search(z_NC, codebook_VC, backend="triton"), z_NC, codebook_VC, False)


def test_no_vectors():
    assert codebook_search(
        torch.zeros(0, 8, device=DEVICE), torch.zeros(3, 8, device=DEVICE), backend="triton"
    ).shape == (0,)


def test_every_index_is_written_and_padding_too(monkeypatch):
    poisoned, new_empty = [], torch.Tensor.new_empty

    def poison(self, *size, **options):
        made = new_empty(self, *size, **options)
        poisoned.append(made.fill_(torch.nan if made.dtype.is_floating_point else -1))
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)
    z_NC, codebook_VC = make(33, 300, 20)
    idx_N = codebook_search(z_NC, codebook_VC, backend="triton")
    made = [t for t in poisoned if t.numel()]
    assert len(made) >= 3 and not any(t.isnan().any() for t in made)
    check(idx_N, z_NC, codebook_VC, False)


def test_no_gradient():
    z_NC, codebook_VC = (t.requires_grad_() for t in make(3, 5, 8))
    assert not codebook_search(z_NC, codebook_VC, backend="triton").requires_grad


def test_what_it_cannot_take():
    with pytest.raises(BackendUnavailable, match="codebook_search: .* float64"):
        codebook_search(torch.zeros(2, 8, device=DEVICE), torch.zeros(3, 8, device=DEVICE).double(), backend="triton")
    with pytest.raises(UserError, match="given 200 and 3"):
        codebook_search(torch.zeros(2, 200, device=DEVICE), torch.zeros(3, 200, device=DEVICE), backend="triton")


def test_opcheck():
    torch.library.opcheck(torch.ops.var_fast.codebook_search_triton.default, (*make(5, 7, 8), False))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    "N, V, C", [(43520, 4096, 32), (9000, 16384, 64), (5000, 2048, 16), (64, 4096, 32), (1, 4096, 32)]
)
def test_on_a_gpu(N, V, C, cosine, dtype):
    z_NC, codebook_VC = (t.to(dtype) for t in make(N, V, C))
    codebook_search(z_NC, codebook_VC, cosine, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    idx_N = codebook_search(z_NC, codebook_VC, cosine, backend="triton")
    used = torch.cuda.max_memory_allocated() - before
    assert used <= 8 * N + 20 * V * C + 2**20  # O(N + V); the distances would be 4 N V
    check(idx_N, z_NC, codebook_VC, cosine)
    assert torch.equal(idx_N, codebook_search(z_NC, codebook_VC, cosine, backend="triton"))
