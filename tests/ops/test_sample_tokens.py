"""sample_tokens: the filter of the published code, the distribution drawn from, and native equal to the reference."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.close_draws import near_ties, photo_finishes
from var_fast.errors import UserError
from var_fast.ops.philox import TOKEN_STREAM, exponentials
from var_fast.ops.sample_tokens import filter_logits_, sample_tokens, sample_tokens_reference

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "adaln_l2norm.npz")
BACKENDS = ["reference", "native"]
POISONS = list(itertools.product([float("nan"), float("inf"), -float("inf")], [False, True]))


def random_case(seed, B=2, l=3, V=50, dtype=torch.float32, levels=None):
    """cond, uncond (B, l, V) and seeds (B,); `levels`: logits take that many values only, so that many tie."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, B, l, V)
    if levels is None:
        logits = 2 * torch.randn(shape, generator=generator)
    else:
        logits = torch.randint(levels, shape, generator=generator).float() / 2
    return *logits.to(dtype), torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator)


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
    """In 20,000 draws every code that is kept and likely enough turns up, and none that is dropped."""
    k, p = key.removeprefix("filter_kept_k").split("_p")
    seed = torch.tensor([3])
    for row, kept in zip(GOLDEN["filter_logits"].reshape(-1, 97), GOLDEN[key].reshape(-1, 97)):
        weights = torch.from_numpy(np.where(kept, np.exp(row.astype(np.float64) - row.max()), 0))
        certain = weights / weights.sum() > 1e-3  # missed by all with probability exp(-20)
        cond = torch.from_numpy(row).expand(1, 20_000, 97)
        drawn = sample_tokens(cond, None, 0.0, int(k), float(p), seed, 0, backend=backend)
        counts = torch.bincount(drawn.flatten(), minlength=97)
        assert (counts[certain] > 0).all()
        assert (counts[~torch.from_numpy(kept)] == 0).all()


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
    scale=st.sampled_from([0, 9, 2**32 - 1]),
)
def test_native_equals_reference(seed, B, l, V, guidance, top_k, top_p, dtype, levels, scale):
    cond, uncond, seeds = random_case(seed, B, l, V, dtype, levels)
    arguments = (cond, None if guidance is None else uncond, guidance or 0.0, top_k, top_p, seeds, scale)
    native = sample_tokens(*arguments, backend="native")
    reference = sample_tokens_reference(*arguments)
    assert native.dtype == reference.dtype == torch.int64
    assert native.shape == reference.shape == (B, l)
    sure = ~near_ties(*arguments)
    assert torch.equal(native[sure], reference[sure])


@pytest.mark.parametrize("threads", [1, 3])
def test_native_equals_reference_at_full_size(threads):
    cond, uncond, seeds = random_case(5, B=4, l=25, V=4096)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for top_k, top_p in [(0, 0.0), (900, 0.96), (0, 0.5), (2000, 0.0)]:
            arguments = (cond, uncond, 1.3, top_k, top_p, seeds, 9)
            assert torch.equal(sample_tokens(*arguments, backend="native"), sample_tokens_reference(*arguments))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layout_does_not_matter(backend):
    cond, uncond, seeds = random_case(6, B=3, l=4, V=20)
    expected = sample_tokens(cond, uncond, 1.0, 5, 0.9, seeds, 1, backend=backend)

    def strided(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    spread = seeds.repeat_interleave(2)[::2]
    assert torch.equal(sample_tokens(strided(cond), uncond, 1.0, 5, 0.9, spread, 1, backend=backend), expected)
    both = torch.cat([cond, uncond], dim=-1)
    assert torch.equal(sample_tokens(both[..., :20], both[..., 20:], 1.0, 5, 0.9, seeds, 1, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_left_as_they_were(backend):
    cond, uncond, seeds = random_case(7, dtype=torch.float64)
    copies = cond.clone(), uncond.clone(), seeds.clone()
    sample_tokens(cond, uncond, 1.0, 5, 0.9, seeds, 1, backend=backend)
    sample_tokens(cond, None, 0.0, 5, 0.9, seeds, 1, backend=backend)
    assert all(map(torch.equal, copies, (cond, uncond, seeds)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_does_not_depend_on_its_batch(backend):
    cond, uncond, seeds = random_case(8, B=19)
    together = sample_tokens(cond, uncond, 2.0, 9, 0.8, seeds, 2, backend=backend)
    rows = zip(cond.split(1), uncond.split(1), seeds.split(1), strict=True)
    assert torch.equal(
        together, torch.cat([sample_tokens(c, n, 2.0, 9, 0.8, s, 2, backend=backend) for c, n, s in rows])
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_best_code_always_stays(backend):
    cond, _, seeds = random_case(9, l=40)
    assert torch.equal(sample_tokens(cond[:, :1], None, 0.0, 1, 0.0, seeds, 1, backend=backend), cond[:, :1].argmax(-1))
    cond = cond[:, :1].expand(2, 40, 50)
    for top_k, top_p in [(1, 0.0), (0, 1e-9), (7, 1e-9)]:
        assert torch.equal(sample_tokens(cond, None, 0.0, top_k, top_p, seeds, 1, backend=backend), cond.argmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties(backend):
    """All that tie with the k-th stay; of equal probabilities top-p drops the lower indices first."""
    logits, seed = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]).expand(1, 100, 5), torch.tensor([0])
    assert sample_tokens(logits, None, 0.0, 2, 0.0, seed, 0, backend=backend).unique().tolist() == [1, 2, 3]
    equal = torch.zeros(1, 100, 4)
    assert sample_tokens(equal, None, 0.0, 0, 0.6, seed, 0, backend=backend).unique().tolist() == [1, 2, 3]
    assert sample_tokens(equal, None, 0.0, 0, 0.5, seed, 0, backend=backend).unique().tolist() == [2, 3]
    assert sample_tokens(equal, None, 0.0, 0, 0.1, seed, 0, backend=backend).unique().tolist() == [3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_race(backend):
    """Of equal logits the code of the least random number wins; a lead of 1e-11 is enough."""
    l, V, seed, scale = 50, 33, torch.tensor([4]), 7
    e_lV = exponentials(seed, TOKEN_STREAM, scale, l, V)[0]
    logits = torch.zeros(1, l, V)
    assert torch.equal(sample_tokens(logits, None, 0.0, 0, 0.0, seed, scale, backend=backend)[0], e_lV.argmin(-1))
    for margin, winner in ((1e-11, 0), (-1e-11, 1)):
        logits = photo_finishes(4, scale, l, margin)
        assert sample_tokens(logits, None, 0.0, 0, 0.0, seed, scale, backend=backend).unique().tolist() == [winner]


def test_logits_that_are_off_change_few_draws():
    """No more than sum |p - q| of them: 0.8 of the standard deviation of the noise, on average over normal noise."""
    V, draws, noise = 1000, 4000, 0.02
    generator = torch.Generator().manual_seed(17)
    logits = torch.randn(1, draws, V, generator=generator)
    off = logits + noise * torch.randn(1, draws, V, generator=generator)
    seed = torch.tensor([1])
    differ = sample_tokens(logits, None, 0.0, 0, 0.0, seed, 0) != sample_tokens(off, None, 0.0, 0, 0.0, seed, 0)
    most = (logits.double().softmax(-1) - off.double().softmax(-1)).abs().sum(-1).mean()
    assert 0.2 * most < differ.double().mean() < most


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_formula(backend):
    cond, uncond, seeds = random_case(10, l=30, dtype=torch.float64)
    guided = 2.5 * cond - 1.5 * uncond
    expected = sample_tokens_reference(guided, None, 0.0, 11, 0.9, seeds, 1)
    assert torch.equal(sample_tokens(cond, uncond, 1.5, 11, 0.9, seeds, 1, backend=backend), expected)
    assert not torch.equal(expected, sample_tokens_reference(cond, None, 0.0, 11, 0.9, seeds, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies_follow_the_kept_probabilities(backend):
    """Pearson's chi-square over 20,000 draws with a fixed seed; the bound is its 99.99% quantile at 9 degrees."""
    draws, V = 20_000, 16
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(V, generator=generator)
    kept = filter_logits_(logits.double()[None, None], 10, 0.0).flatten().softmax(0)
    drawn = sample_tokens(logits.expand(1, draws, V), None, 0.0, 10, 0.0, torch.tensor([11]), 0, backend=backend)
    observed = torch.bincount(drawn.flatten(), minlength=V)
    assert observed[kept == 0].sum() == 0
    expected = draws * kept[kept > 0]
    assert len(expected) == 10
    assert ((observed[kept > 0] - expected) ** 2 / expected).sum() < 33.7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("poison", "with_uncond"), POISONS)
def test_logits_that_are_not_finite_name_the_image(backend, poison, with_uncond):
    cond, uncond, seeds = random_case(12, B=4)
    (uncond if with_uncond else cond)[2, 1, 3] = poison
    with pytest.raises(UserError, match="image 2 .*not finite"):
        sample_tokens(cond, uncond if with_uncond else None, 0.0, 5, 0.9, seeds, 1, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"seed_B": torch.zeros(2, device="meta", dtype=torch.int64)}, "on cpu, meta, expected one device"),
        ({"seed_B": torch.zeros(3, dtype=torch.int64)}, r"seed_B is \(3,\) torch.int64, expected \(2,\) int64"),
        ({"seed_B": torch.zeros(2)}, "seed_B is .* torch.float32"),
        ({"scale": -1}, "scale is -1"),
        ({"scale": 2**32}, "scale is 4294967296"),
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
    cond, uncond, seeds = random_case(13)
    arguments = dict(cond_BlV=cond, uncond_BlV=uncond, guidance=1.0, top_k=5, top_p=0.9, seed_B=seeds, scale=0)
    with pytest.raises(UserError, match=message):
        sample_tokens(**(arguments | change))


def test_no_image_and_no_token():
    for shape in [(0, 3, 5), (2, 0, 5)]:
        for backend in BACKENDS:
            seeds = torch.zeros(shape[0], dtype=torch.int64)
            drawn = sample_tokens(torch.zeros(shape), None, 0.0, 0, 0.0, seeds, 0, backend=backend)
            assert drawn.shape == shape[:2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "with_uncond"), [(torch.float32, True), (torch.bfloat16, False)])
def test_operator_is_registered_correctly(backend, dtype, with_uncond):
    cond, uncond, seeds = random_case(14, dtype=dtype)
    cond.requires_grad_()
    arguments = (cond, uncond if with_uncond else None, 1.0, 5, 0.9, seeds, 1, backend)
    torch.library.opcheck(torch.ops.var_fast.sample_tokens.default, arguments)


def test_the_fake_answer_checks_shapes():
    cond, uncond, seeds = (x.to("meta") for x in random_case(15))
    drawn = sample_tokens(cond, uncond, 1.0, 5, 0.9, seeds, 0)
    assert (drawn.device.type, drawn.dtype, drawn.shape) == ("meta", torch.int64, (2, 3))
    with pytest.raises(UserError, match=r"seed_B is \(1,\)"):
        sample_tokens(cond, uncond, 1.0, 5, 0.9, seeds[:1], 0)


def test_under_torch_compile():
    """One graph without breaks, the same tokens as uncompiled, errors of the run with their type and text."""

    def draw(cond, uncond, guidance, seeds):
        return sample_tokens(2 * cond, uncond, guidance, 9, 0.8, seeds, 3) + 1

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for B, guidance in [(2, 0.5), (5, 1.5)]:  # the second call has sizes and numbers of its own
        cond, uncond, seeds = random_case(16, B=B)
        assert torch.equal(compiled(cond, uncond, guidance, seeds), draw(cond, uncond, guidance, seeds))
    cond[3, 0, 0] = torch.nan
    with pytest.raises(UserError, match="image 3 .*not finite"):
        compiled(cond, uncond, 1.5, seeds)


def test_a_huge_top_k_keeps_all():
    cond, seed = torch.randn(1, 20, 5), torch.tensor([0])
    all_ = sample_tokens(cond, None, 0.0, 0, 0.0, seed, 0)
    assert torch.equal(sample_tokens(cond, None, 0.0, 2**70, 0.0, seed, 0), all_)
