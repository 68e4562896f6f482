"""qk_norm and scale_attention of sampling on the CPU: each scale's queries over the keys and values cached so far.

The instruction set is chosen once in a process, so each one has a process of its own; `python -m` this file runs there.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.on_isa import ISAS, run_on
from var_fast import _C
from var_fast.ops.qk_norm import qk_norm_reference

TYPES = {torch.float32: 0, torch.bfloat16: 1}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # ||out - reference|| / ||reference||
VAR_256 = tuple(pn * pn for pn in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))


class Cache:
    """One layer's caches of R images. They start as NaN, not zero: nothing unwritten may count."""

    def __init__(self, R, H, D, capacity, dtype, threads=2):
        self.R, self.H, self.D, self.capacity, self.dtype, self.threads = R, H, D, capacity, dtype, threads
        self.k = self._unset(_C.cpu_k_cache_bytes(TYPES[dtype], R, H, D, capacity))
        self.v = self._unset(_C.cpu_v_cache_bytes(TYPES[dtype], R, H, D, capacity))
        self.length = 0

    def _unset(self, size):
        return torch.full((size // self.dtype.itemsize,), torch.nan, dtype=self.dtype)

    def attend(self, qkv_SL3HD, scale_H, softmax_scale):
        """Append a scale (S, l, 3, H, D); its queries' attention (R, l, H, D) over all tokens so far."""
        S, l = qkv_SL3HD.shape[:2]
        type_, shape, caches = TYPES[self.dtype], (self.R, l, self.H, self.D), (self.k.data_ptr(), self.v.data_ptr())
        q = self._unset(_C.cpu_q_bytes(type_, *shape))
        scale = 0 if scale_H is None else scale_H.data_ptr()
        _C.cpu_qk_norm(
            qkv_SL3HD.data_ptr(), type_, scale, softmax_scale, S, *shape, q.data_ptr(), *caches, self.length,
            self.capacity, self.threads,
        )  # fmt: skip
        self.length += l
        out = torch.full(shape, torch.nan, dtype=self.dtype)
        _C.cpu_scale_attention(
            q.data_ptr(), *caches, type_, *shape, self.length, self.capacity, out.data_ptr(), self.threads
        )
        return out


def sources(images, R):
    """(R, ...): image r is source min(r, S - 1)."""
    return images[torch.arange(R).clamp(max=images.shape[0] - 1)]


def reference(qkvs, R, scale_H, softmax_scale):
    """Float64 outputs (R, l, H, D) of all scales in a row."""
    k, v, outs = [], [], []
    for qkv in qkvs:
        parts = qk_norm_reference(sources(qkv, R).double(), None if scale_H is None else scale_H.double())
        q, *new = (part.transpose(1, 2) for part in parts)
        k.append(new[0]), v.append(new[1])
        weights = (softmax_scale * q @ torch.cat(k, 2).mT).softmax(-1)
        outs.append((weights @ torch.cat(v, 2)).transpose(1, 2))
    return outs


def random_case(seed, lengths, first_S, R, H, D, dtype, normed):
    """qkvs of scales of `lengths` tokens, the first from `first_S` sources, scale_H and softmax_scale."""
    generator = torch.Generator().manual_seed(seed)
    qkvs = [torch.randn(R if i else first_S, l, 3, H, D, generator=generator).to(dtype) for i, l in enumerate(lengths)]
    if normed:  # learned scales begin at 4; a score's error in bfloat16 grows with them
        return qkvs, 1 + 9 * torch.rand(H, generator=generator), 1.0
    return qkvs, None, D**-0.5


def errors(lengths, first_S, R, H, D, dtype, normed, seed=0, spare=0):
    """Relative errors of the scales, all computed step by step on one cache of `spare` tokens too many."""
    qkvs, scale_H, softmax_scale = random_case(seed, lengths, first_S, R, H, D, dtype, normed)
    cache = Cache(R, H, D, sum(lengths) + spare, dtype)
    outs = [cache.attend(qkv, scale_H, softmax_scale) for qkv in qkvs]
    exact = reference(qkvs, R, scale_H, softmax_scale)
    return [((out - to).norm() / to.norm()).item() for out, to in zip(outs, exact)]


CASES = [
    (lengths, first_S, R, H, D, normed)
    for lengths, first_S, R, H, D in [
        ((1, 4, 9, 16, 25, 36, 64), 2, 3, 2, 64),
        ((1, 4, 9), 1, 4, 1, 32),
        ((7, 30, 13), 3, 3, 3, 96),
        ((1, 64, 50), 1, 1, 2, 128),
        ((5, 18), 2, 2, 2, 40),
        ((3, 600, 37, 500), 1, 2, 1, 64),  # more keys than one block holds
    ]
    for normed in (True, False)
]


def run_cases():
    return [
        (str(dtype), case, errors(*case[:5], dtype, case[5], seed=i), BOUNDS[dtype])
        for dtype in TYPES
        for i, case in enumerate(CASES)
    ]


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees_with_float64(isa):
    done = run_on(isa, "-m", "tests.ops.test_cached_attention")
    results = json.loads(done.stdout)
    assert len(results) == 2 * len(CASES)
    wrong = [result for result in results if not all(error <= result[3] for error in result[2])]
    assert not wrong


@pytest.mark.parametrize("dtype", TYPES)
def test_the_scales_of_a_256_px_image(dtype):
    assert max(errors(VAR_256, 1, 2, 2, 64, dtype, True)) <= BOUNDS[dtype]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 3),
    st.sampled_from([8, 24, 32, 64, 96, 128]),
    st.sampled_from(list(TYPES)),
    st.booleans(),
    st.integers(0, 40),
    st.integers(0, 2**31),
)
def test_any_shape(lengths, first_S, more_images, H, D, dtype, normed, spare, seed):
    worst = max(errors(lengths, first_S, first_S + more_images, H, D, dtype, normed, seed, spare))
    assert worst <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_large_scores(dtype):
    """Scores of 100 |q| |k| and more: only differences to the largest may be exponentiated."""
    qkvs, scale_H, _ = random_case(3, (2, 40), 2, 2, 2, 64, dtype, True)
    scale_H.fill_(100.0)
    outs, cache = [], Cache(2, 2, 64, 42, dtype)
    for qkv in qkvs:
        outs.append(cache.attend(qkv, scale_H, 1.0))
    for out, exact in zip(outs, reference(qkvs, 2, scale_H, 1.0)):
        # a score of 100 has an error of 100 times the products' own
        assert ((out - exact).norm() / exact.norm()) <= (1e-4 if dtype == torch.float32 else 0.2)


def test_float32_depends_neither_on_the_batch_nor_on_the_threads():
    lengths, R = (1, 9, 50, 169, 600), 3
    qkvs, scale_H, softmax_scale = random_case(5, lengths, R, R, 2, 64, torch.float32, True)
    together = Cache(R, 2, 64, sum(lengths), torch.float32, threads=2)
    alone = [Cache(1, 2, 64, sum(lengths), torch.float32, threads=1) for _ in range(R)]
    for qkv in qkvs:
        out = together.attend(qkv, scale_H, softmax_scale)
        for r, cache in enumerate(alone):
            assert torch.equal(cache.attend(qkv[r : r + 1], scale_H, softmax_scale)[0], out[r])


def test_a_zero_vector_has_no_direction():
    """As F.normalize: 0 / max(0, 1e-12) = 0, so the weights are equal."""
    qkv = torch.zeros(1, 6, 3, 1, 32)
    qkv[:, :, 2] = torch.arange(6.0).view(1, 6, 1, 1)
    out = Cache(1, 1, 32, 6, torch.float32).attend(qkv, torch.ones(1), 1.0)
    torch.testing.assert_close(out, torch.full_like(out, 2.5))


if __name__ == "__main__":
    print(json.dumps(run_cases()))
