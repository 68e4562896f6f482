"""The native loop on a CUDA device: the modules' logits, graphs, the CPU's tokens, errors."""

from __future__ import annotations

import pytest
import torch

from bench.quality import quality_rows
from tests.engine import test_native_loop as on_cpu
from tests.models.golden_util import CASES, load_case
from var_fast import Sampler, load_checkpoint
from var_fast.engine.graphs import Graphs
from var_fast.engine.native_loop import NativeLoop
from var_fast.engine.options import SamplingOptions
from var_fast.engine.python_loop import PythonLoop
from var_fast.errors import UserError
from var_fast.ops.backend import cuda_problem, native_problem

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LABELS, SEEDS = [1, 5, 7], [4, 2**40, -3]


@pytest.fixture(autouse=True)
def exact_float32():
    assert (native_problem() or cuda_problem()) is None
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(params=CASES)
def case(request):
    case = load_case(request.param)
    case.vae.to(DEVICE).eval()
    case.var.to(DEVICE).eval()
    return case


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("float16", 4e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_logits_of_every_scale_and_the_image(case, dtype, tolerance, cfg, monkeypatch):
    tokens = [idx_Bl.to(DEVICE) for idx_Bl in on_cpu.some_tokens(case.var)]
    monkeypatch.setattr(on_cpu, "LABELS", on_cpu.LABELS.to(DEVICE))
    logits, image_B3HW = on_cpu.follow(NativeLoop(case.var, getattr(torch, dtype)), tokens, cfg)
    expected, expected_B3HW = on_cpu.reference(case.var, tokens, cfg)
    for si in range(len(case.var.patch_nums)):
        assert on_cpu.relative(logits[si], expected[si]) < tolerance, si
    assert on_cpu.relative(image_B3HW, expected_B3HW) < tolerance


@pytest.mark.parametrize("dtype,tolerance", [("float16", 4e-3), ("bfloat16", 3e-2)])
def test_blocks_in_one_launch(dtype, tolerance, monkeypatch):
    monkeypatch.setenv("VAR_FAST_ONE_LAUNCH_ROWS", "1024")
    monkeypatch.setattr(on_cpu, "LABELS", on_cpu.LABELS.to(DEVICE))
    var = load_checkpoint("demo").var.to(DEVICE).eval()
    tokens = [idx_Bl.to(DEVICE) for idx_Bl in on_cpu.some_tokens(var)]
    loop = NativeLoop(var, getattr(torch, dtype))
    logits, _ = on_cpu.follow(loop, tokens)
    expected, _ = on_cpu.reference(var, tokens)
    for si in range(len(var.patch_nums)):
        assert on_cpu.relative(logits[si], expected[si]) < tolerance, si
    again, _ = on_cpu.follow(loop, tokens)  # the barrier is ready for more
    assert all(map(torch.equal, logits, again))


def test_blocks_in_one_launch_of_a_graph(monkeypatch):
    """A cooperative launch among dependent ones, captured and replayed: what the same kernels give one by one."""
    monkeypatch.setenv("VAR_FAST_ONE_LAUNCH_ROWS", "1024")
    sampler = Sampler(load_checkpoint("demo").var, dtype="bfloat16", device=DEVICE)
    labels, seeds = [1, 5, 7, 2], [4, 2**40, -3, 8]  # as many as a graph's own, so that no image is added
    made, again = (sampler.sample(labels, seeds) for _ in range(2))
    assert torch.equal(made, again)
    *_, expected = sampler.stream(labels, seeds)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("more_smooth", [False, True])
def test_graphs_give_the_modules_images(case, more_smooth):
    sampler = Sampler(case.var, dtype="float32")
    options = SamplingOptions(1.5, 50, 0.9, more_smooth)
    made = sampler.sample(LABELS, SEEDS, *options)
    label_B, seed_B = torch.tensor(LABELS, device=DEVICE), torch.tensor(SEEDS, device=DEVICE)
    expected = PythonLoop(case.var, torch.float32).sample(label_B, seed_B, options)
    assert on_cpu.relative(made, expected) < 1e-4


def test_the_cpu_makes_the_same_images():
    on_gpu = Sampler(load_checkpoint("demo").var, dtype="float32", device=DEVICE)
    labels, seeds = list(range(64)), list(range(64))
    together = on_gpu.sample(labels, seeds).cpu()
    on_cpu_ = Sampler(load_checkpoint("demo").var, dtype="float32", device="cpu")
    # sums are in another order: where the two first of a race come within rounding, the image is another from there
    same = (together - on_cpu_.sample(labels, seeds)).abs().flatten(1).amax(1) < 1e-3
    assert same.float().mean() >= 0.97
    alone = torch.cat([on_gpu.sample(labels[i : i + 1], seeds[i : i + 1]) for i in range(8)]).cpu()
    assert ((alone - together[:8]).abs().flatten(1).amax(1) < 1e-3).all()


def test_a_graph_is_replayed_for_its_bucket(case):
    sampler = Sampler(case.var, dtype="bfloat16", max_batch=4)
    graphs = sampler.graphs
    for batch in (1, 3, 4, 3, 1, 9):
        images = sampler.sample([1] * batch, list(range(batch)))
        assert images.shape[0] == batch
    assert {size for size, _ in graphs._captured} == {1, 4}
    a, b = sampler.sample([1], [5]), sampler.sample([2], [6])
    assert not torch.equal(a, b)  # no two results share memory


def test_weights_that_change_are_heard(case):
    sampler = Sampler(case.var, dtype="float32")
    before = sampler.sample([1], [0])
    with torch.no_grad():
        case.var.blocks[1].ffn.fc2.weight.mul_(-1)
    after = sampler.sample([1], [0])
    assert not torch.equal(before, after)
    assert torch.equal(after, Sampler(case.var, dtype="float32").sample([1], [0]))


def test_logits_that_are_not_finite_are_named_and_nothing_is_lost(case):
    sampler = Sampler(case.var, dtype="float32")
    expected = sampler.sample([1, 2], [0, 0])
    with torch.no_grad():
        good = case.var.class_emb.weight[2].clone()
        case.var.class_emb.weight[2].fill_(torch.nan)
        for call in (sampler.sample, lambda *args: list(sampler.stream(*args))):
            with pytest.raises(UserError, match="scale 0, image 1"):
                call([1, 2], [0, 0])
        case.var.class_emb.weight[2] = good
    torch.testing.assert_close(sampler.sample([1, 2], [0, 0]), expected)


def test_out_of_memory_makes_smaller_parts(case, monkeypatch):
    sampler = Sampler(case.var, dtype="float32", max_batch=8)
    labels, seeds = list(range(7)), list(range(7))
    expected = sampler.sample(labels, seeds)
    smaller = Sampler(case.var, dtype="float32", max_batch=8)
    capture = Graphs._capture

    def full(self, size, *args):
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(self, size, *args)

    monkeypatch.setattr(Graphs, "_capture", full)
    torch.testing.assert_close(smaller.sample(labels, seeds), expected, atol=1e-4, rtol=0)
    assert smaller.graphs.largest == 2


def test_stream_and_published_draws(case):
    sampler = Sampler(case.var, dtype="float32")
    *_, last = sampler.stream(LABELS, SEEDS)
    torch.testing.assert_close(last, sampler.sample(LABELS, SEEDS), atol=1e-4, rtol=0)
    image_B3HW = case.var.autoregressive_infer_cfg(2, torch.tensor([1, 2], device=DEVICE), g_seed=3, top_k=1)
    assert case.var._native is not None and torch.isfinite(image_B3HW).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_draw_the_tokens_of_float32(dtype):
    """97% is asked; on a CPU bfloat16 draws 99.3%, float16 99.8%."""
    (row,) = quality_rows([("var_fast", dtype, "auto")], range(75), [0] * 75, "cuda")
    assert row["token_agreement"] > 0.985
