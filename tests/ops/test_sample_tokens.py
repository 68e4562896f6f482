"""sample_tokens: the filter of the published code, the distribution drawn from, and native equal to the reference."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from var_fast.errors import UserError
from var_fast.ops.sample_tokens import filter_logits_, sample_tokens, sample_tokens_reference

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "adaln_l2norm.npz")
BACKENDS = ["reference", "native"]
POISONS = list(itertools.product([float("nan"), float("inf"), -float("inf")], [False, True]))


def random_case(seed, B=2, l=3, V=50, dtype=torch.float32, levels=None):
    """cond, uncond (B, l, V) and u (B, l); `levels`: logits take that many values only, so that many tie."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, B, l, V)
    if levels is None:
        logits = 2 * torch.randn(shape, generator=generator)
    else:
        logits = torch.randint(levels, shape, generator=generator).float() / 2
    u = torch.rand(B, l, generator=generator, dtype=torch.float64)
    return *logits.to(dtype), u


@pytest.mark.parametrize("key", [name for name in GOLDEN.files if name.startswith("filter_kept_")])
def test_filter_keeps_what_the_published_code_keeps(key):
    k, p = key.removeprefix("filter_kept_k").split("_p")
    logits = torch.from_numpy(GOLDEN["filter_logits"]).clone()
    kept = filter_logits_(logits, int(k), float(p)) > -torch.inf
    assert torch.equal(kept, torch.from_numpy(GOLDEN[key]))
    assert torch.equal(logits[kept], torch.from_numpy(GOLDEN["filter_logits"])[kept])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", [name for name in GOLDEN.files if name.startswith("filter_kept_")])
def test_every_backend_draws_exactly_what_the_published_filter_keeps(backend, key):
    """u swept finely enough over [0, 1) to hit every kept code of the golden logits, and no other."""
    k, p = key.removeprefix("filter_kept_k").split("_p")
    for row, kept in zip(GOLDEN["filter_logits"].reshape(-1, 97), GOLDEN[key].reshape(-1, 97)):
        exact = np.cumsum(np.where(kept, np.exp(row.astype(np.float64) - row.max()), 0))
        middles = (exact - np.diff(exact, prepend=0) / 2)[kept] / exact[-1]
        u = torch.from_numpy(middles).reshape(1, -1)
        cond = torch.from_numpy(row).expand(1, u.shape[1], 97)
        drawn = sample_tokens(cond, None, 0.0, int(k), float(p), u, backend=backend)
        assert drawn.flatten().tolist() == np.flatnonzero(kept).tolist()


def near_ties(cond, uncond, guidance, top_k, top_p, u):
    """(B, l) bool: rows where a cumulative probability lies within 1e-12 of 1 - top_p or of u."""
    guided = cond.to(torch.float64, copy=True)  # filtered in place below, and cond may be float64 itself
    if uncond is not None:
        guided = (1 + guidance) * guided - guidance * uncond.double()
    filter_logits_(guided, top_k, 0.0)
    ascending = guided.sort(dim=-1).values.softmax(dim=-1).cumsum(dim=-1)
    running = filter_logits_(guided, 0, top_p).softmax(dim=-1).cumsum(dim=-1)
    at_p = ((ascending - (1 - top_p)).abs() < 1e-12).any(dim=-1) & (0 < top_p < 1)
    return at_p | ((running - u.unsqueeze(-1)).abs() < 1e-12).any(dim=-1)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    B=st.integers(1, 3),
    l=st.integers(1, 9),
    V=st.integers(1, 130),
    guidance=st.sampled_from([None, 0.0, 0.37, 1.5, 7.0, -0.5]),
    top_k=st.integers(0, 140),
    top_p=st.one_of(st.sampled_from([0.0, 1.0, 1e-9, 0.999999]), st.floats(0, 1)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    levels=st.sampled_from([None, 1, 2, 7]),
)
def test_native_equals_reference(seed, B, l, V, guidance, top_k, top_p, dtype, levels):
    cond, uncond, u = random_case(seed, B, l, V, dtype, levels)
    arguments = (cond, None if guidance is None else uncond, guidance or 0.0, top_k, top_p, u)
    native = sample_tokens(*arguments, backend="native")
    reference = sample_tokens_reference(*arguments)
    assert native.dtype == reference.dtype == torch.int64
    assert native.shape == reference.shape == (B, l)
    sure = ~near_ties(*arguments)
    assert torch.equal(native[sure], reference[sure])


@pytest.mark.parametrize("threads", [1, 3])
def test_native_equals_reference_at_full_size(threads):
    cond, uncond, u = random_case(5, B=4, l=25, V=4096)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for top_k, top_p in [(0, 0.0), (900, 0.96), (0, 0.5), (2000, 0.0)]:
            arguments = (cond, uncond, 1.3, top_k, top_p, u)
            assert torch.equal(sample_tokens(*arguments, backend="native"), sample_tokens_reference(*arguments))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_does_not_matter(backend):
    cond, uncond, u = random_case(6, B=3, l=4, V=20)
    expected = sample_tokens(cond, uncond, 1.0, 5, 0.9, u, backend=backend)

    def strided(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    assert torch.equal(sample_tokens(strided(cond), uncond, 1.0, 5, 0.9, strided(u), backend=backend), expected)
    both = torch.cat([cond, uncond], dim=-1)
    assert torch.equal(sample_tokens(both[..., :20], both[..., 20:], 1.0, 5, 0.9, u, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_left_as_they_were(backend):
    cond, uncond, u = random_case(7, dtype=torch.float64)
    copies = cond.clone(), uncond.clone(), u.clone()
    sample_tokens(cond, uncond, 1.0, 5, 0.9, u, backend=backend)
    sample_tokens(cond, None, 0.0, 5, 0.9, u, backend=backend)
    assert all(map(torch.equal, copies, (cond, uncond, u)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_does_not_depend_on_its_batch(backend):
    cond, uncond, u = random_case(8, B=5)
    together = sample_tokens(cond, uncond, 2.0, 9, 0.8, u, backend=backend)
    alone = [sample_tokens(c[None], n[None], 2.0, 9, 0.8, r[None], backend=backend) for c, n, r in zip(cond, uncond, u)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("backend", BACKENDS)
def test_best_code_always_stays(backend):
    cond, _, u = random_case(9, l=40)
    assert torch.equal(sample_tokens(cond[:, :1], None, 0.0, 1, 0.0, u[:, :1], backend=backend), cond[:, :1].argmax(-1))
    cond = cond[:, :1].expand(2, 40, 50)
    for top_k, top_p in [(1, 0.0), (0, 1e-9), (7, 1e-9)]:
        assert torch.equal(sample_tokens(cond, None, 0.0, top_k, top_p, u, backend=backend), cond.argmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties(backend):
    """All that tie with the k-th stay; of equal probabilities top-p drops the lower indices first."""
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]).expand(1, 100, 5)
    u = (torch.arange(100, dtype=torch.float64) / 100).unsqueeze(0)
    assert sample_tokens(logits, None, 0.0, 2, 0.0, u, backend=backend).unique().tolist() == [1, 2, 3]
    equal = torch.zeros(1, 100, 4)
    assert sample_tokens(equal, None, 0.0, 0, 0.6, u, backend=backend).unique().tolist() == [1, 2, 3]
    assert sample_tokens(equal, None, 0.0, 0, 0.5, u, backend=backend).unique().tolist() == [2, 3]
    assert sample_tokens(equal, None, 0.0, 0, 0.1, u, backend=backend).unique().tolist() == [3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("u_dtype", [torch.float32, torch.float64])
def test_ends_of_u(backend, u_dtype):
    logits = torch.zeros(1, 2, 8)
    logits[..., 0] = logits[..., 7] = -50.0
    largest = torch.nextafter(torch.ones((), dtype=u_dtype), torch.zeros((), dtype=u_dtype))
    u = torch.stack([torch.zeros((), dtype=u_dtype), largest]).unsqueeze(0)
    assert sample_tokens(logits, None, 0.0, 6, 0.0, u, backend=backend).tolist() == [[1, 6]]
    exact = torch.tensor(
        [[0.25, 0.5]], dtype=u_dtype
    )  # the sum must exceed u: at 0.25 the first of four has had its turn
    assert sample_tokens(torch.zeros(1, 2, 4), None, 0.0, 0, 0.0, exact, backend=backend).tolist() == [[1, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_formula(backend):
    cond, uncond, u = random_case(10, dtype=torch.float64)
    guided = 2.5 * cond - 1.5 * uncond
    expected = sample_tokens_reference(guided, None, 0.0, 11, 0.9, u)
    assert torch.equal(sample_tokens(cond, uncond, 1.5, 11, 0.9, u, backend=backend), expected)
    assert not torch.equal(expected, sample_tokens_reference(cond, None, 0.0, 11, 0.9, u))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies_follow_the_kept_probabilities(backend):
    """Pearson's chi-square over 20,000 draws with a fixed seed; the bound is its 99.99% quantile at 9 degrees."""
    draws, V = 20_000, 16
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(V, generator=generator)
    kept = filter_logits_(logits.double()[None, None], 10, 0.0).flatten().softmax(0)
    u = torch.rand(1, draws, generator=generator, dtype=torch.float64)
    drawn = sample_tokens(logits.expand(1, draws, V), None, 0.0, 10, 0.0, u, backend=backend)
    observed = torch.bincount(drawn.flatten(), minlength=V)
    assert observed[kept == 0].sum() == 0
    expected = draws * kept[kept > 0]
    assert len(expected) == 10
    assert ((observed[kept > 0] - expected) ** 2 / expected).sum() < 33.7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("poison", "with_uncond"), POISONS)
def test_logits_that_are_not_finite_name_the_image(backend, poison, with_uncond):
    cond, uncond, u = random_case(12, B=4)
    (uncond if with_uncond else cond)[2, 1, 3] = poison
    with pytest.raises(UserError, match="image 2 .*not finite"):
        sample_tokens(cond, uncond if with_uncond else None, 0.0, 5, 0.9, u, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"u_Bl": torch.full((2, 3), 1.0)}, r"u_Bl has values outside \[0, 1\)"),
        ({"u_Bl": torch.full((2, 3), -0.1)}, r"u_Bl has values outside \[0, 1\)"),
        ({"u_Bl": torch.full((2, 3), float("nan"))}, r"u_Bl has values outside \[0, 1\)"),
        ({"u_Bl": torch.zeros(2, 3, device="meta")}, "on cpu, meta, expected one device"),
        ({"u_Bl": torch.zeros(3, 2)}, r"u_Bl is \(3, 2\)"),
        ({"u_Bl": torch.zeros(2, 3, dtype=torch.int64)}, "u_Bl is .* torch.int64"),
        ({"uncond_BlV": torch.zeros(2, 3, 49)}, r"uncond_BlV is \(2, 3, 49\)"),
        ({"uncond_BlV": torch.zeros(2, 3, 50, dtype=torch.float64)}, "uncond_BlV is .* torch.float64"),
        ({"cond_BlV": torch.zeros(6, 50)}, r"cond_BlV has shape \(6, 50\)"),
        ({"cond_BlV": torch.zeros(2, 3, 0)}, r"cond_BlV has shape \(2, 3, 0\)"),
        ({"cond_BlV": torch.zeros(2, 3, 50, dtype=torch.int64)}, "cond_BlV has dtype torch.int64"),
        ({"backend": "triton"}, "sample_tokens: backend 'triton'"),
        ({"backend": "fast"}, "backend is 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    cond, uncond, u = random_case(13)
    arguments = {"cond_BlV": cond, "uncond_BlV": uncond, "guidance": 1.0, "top_k": 5, "top_p": 0.9, "u_Bl": u}
    with pytest.raises(UserError, match=message):
        sample_tokens(**(arguments | change))


def test_no_image_and_no_token():
    for shape in [(0, 3, 5), (2, 0, 5)]:
        for backend in BACKENDS:
            drawn = sample_tokens(torch.zeros(shape), None, 0.0, 0, 0.0, torch.zeros(shape[:2]), backend=backend)
            assert drawn.shape == shape[:2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "with_uncond"), [(torch.float32, True), (torch.bfloat16, False)])
def test_operator_is_registered_correctly(backend, dtype, with_uncond):
    cond, uncond, u = random_case(14, dtype=dtype)
    cond.requires_grad_()
    arguments = (cond, uncond if with_uncond else None, 1.0, 5, 0.9, u, backend)
    torch.library.opcheck(torch.ops.var_fast.sample_tokens.default, arguments)


def test_the_fake_answer_checks_shapes():
    cond, uncond, u = (x.to("meta") for x in random_case(15))
    drawn = sample_tokens(cond, uncond, 1.0, 5, 0.9, u)
    assert (drawn.device.type, drawn.dtype, drawn.shape) == ("meta", torch.int64, (2, 3))
    with pytest.raises(UserError, match=r"u_Bl is \(2, 2\)"):
        sample_tokens(cond, uncond, 1.0, 5, 0.9, u[:, :2])


def test_under_torch_compile():
    """One graph without breaks, the same tokens as uncompiled, errors of the run with their type and text."""

    def draw(cond, uncond, guidance, u):
        return sample_tokens(2 * cond, uncond, guidance, 9, 0.8, u) + 1

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for B, guidance in [(2, 0.5), (5, 1.5)]:  # the second call has sizes and numbers of its own
        cond, uncond, u = random_case(16, B=B)
        assert torch.equal(compiled(cond, uncond, guidance, u), draw(cond, uncond, guidance, u))
    cond[3, 0, 0] = torch.nan
    with pytest.raises(UserError, match="image 3 .*not finite"):
        compiled(cond, uncond, 1.5, u)


def test_a_huge_top_k_keeps_all():
    cond, u = torch.randn(1, 2, 5), torch.rand(1, 2)
    assert torch.equal(sample_tokens(cond, None, 0.0, 2**70, 0.0, u), sample_tokens(cond, None, 0.0, 0, 0.0, u))
