import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import timeline
from bench.timeline import IDLE, Event, Span, device_spans, host_spans, picture, record, timeline_of_trace
from var_fast import Sampler, load_checkpoint
from var_fast.models import VAR, VQVAE, autoencoder, block, quantizer


def seconds_by_operator(spans):
    totals = {}
    for span in spans:
        totals[span.operator] = totals.get(span.operator, 0) + span.end - span.begin
    return {operator: pytest.approx(total) for operator, total in totals.items()}


def check_apart(spans):
    assert all(span.end > span.begin for span in spans)
    assert all(one.end <= other.begin for one, other in zip(spans, spans[1:]))


def test_a_range_owns_what_is_in_it():
    events = [
        Event(1, 6, "op:qk_norm"),
        Event(2, 3, "aten::linear"),
        Event(3, 5, "aten::convolution"),
        Event(4, 5, "op:sample_tokens"),
        Event(7, 8, "aten::mm"),
    ]
    assert seconds_by_operator(host_spans(events)) == {"qk_norm": 5, "matrix products": 1}
    assert seconds_by_operator(host_spans([Event(0, 2, "var_fast::sample_tokens"), Event(0.5, 1, "aten::mm")])) == {
        "sample_tokens": 2
    }


def test_calls_outside_of_ranges_are_classed_by_name():
    events = [
        Event(0, 100, "whole"),
        Event(1, 50, "scale:0:1"),
        Event(2, 12, "aten::linear"),
        Event(3, 4, "aten::t"),  # of the call around it
        Event(5, 7, "aten::to"),  # a cast
        Event(6, 7, "aten::copy_"),
        Event(8, 11, "aten::addmm"),
        Event(12, 13, "aten::gelu"),
        Event(14, 18, "aten::scaled_dot_product_attention"),
        Event(15, 17, "aten::_scaled_dot_product_flash_attention_for_cpu"),
        Event(60, 90, "part:decoder"),
        Event(61, 71, "aten::conv2d"),
        Event(62, 71, "aten::mkldnn_convolution"),
        Event(72, 74, "aten::upsample_nearest2d"),
        Event(75, 76, "aten::resolve_conj"),
    ]
    spans = host_spans(events)
    check_apart(spans)
    assert seconds_by_operator(spans) == {
        "matrix products": 8,
        "other": 2 + 1 + 1,
        "attention": 4,
        "convolution": 10,
        "resampling": 2,
    }


def test_what_sticks_out_of_its_caller_by_rounding_is_cut():
    spans = host_spans([Event(0, 1, "op:qk_norm"), Event(0.5, 1.001, "aten::mm"), Event(1, 2, "aten::mm")])
    check_apart(spans)
    assert seconds_by_operator(spans) == {"qk_norm": 1, "matrix products": 1}


@st.composite
def nests(draw, begin=0.0, end=1000.0, depth=0):
    """Events of one thread, and the moments at which they begin and end."""
    events, now = [], begin
    for _ in range(draw(st.integers(0, 3 if depth < 3 else 0))):
        left = end - now
        start = now + left * draw(st.floats(0, 0.4))
        stop = start + (end - start) * draw(st.floats(0.1, 0.9))
        name = draw(st.sampled_from(["op:a", "op:b", "aten::mm", "aten::gelu", "aten::copy_", "scale:0:1"]))
        events.append(Event(start, stop, name))
        events += draw(nests(start, stop, depth + 1))
        now = stop
    return events


@settings(max_examples=60, deadline=None)
@given(nests(), st.randoms())
def test_spans_of_any_nest_are_apart_and_cover_all_calls(events, random):
    random.shuffle(events)
    spans = host_spans(events)
    check_apart(spans)
    calls = sorted(event for event in events if not event.name.startswith("scale:"))
    covered, now = 0.0, 0.0
    for event in calls:  # the length of their union
        covered += max(0.0, event.end - max(event.begin, now))
        now = max(now, event.end)
    assert sum(span.end - span.begin for span in spans) == pytest.approx(covered)


def test_kernels_belong_to_the_range_on_the_device_that_holds_them():
    ranges = [
        Event(10, 20, "op:pyramid_update"),
        Event(12, 14, "op:sample_tokens"),  # within another: that one owns it
        Event(5, 100, "scale:3:4"),
        Event(30, 31, "op:qk_norm"),
    ]
    kernels = [
        Event(30, 31, "k", "aten::mul"),
        Event(10, 11, "k", "aten::index"),
        Event(12, 14, "k", "aten::convolution"),
        Event(19, 20, "k", None),
        Event(21, 25, "sm90_gemm", "aten::addmm"),
        Event(26, 27, "k", "aten::gelu"),
        Event(28, 29, "k", "aten::_flash_attention_forward"),
        Event(40, 41, "fprop", "aten::cudnn_convolution"),
        Event(42, 43, "k", "var_fast::group_norm_silu"),
    ]
    spans = device_spans(kernels, ranges)
    check_apart(spans)
    assert seconds_by_operator(spans) == {
        "pyramid_update": 4,
        "qk_norm": 1,
        "matrix products": 4,
        "other": 1,
        "attention": 1,
        "convolution": 1,
        "group_norm_silu": 1,
    }


def test_kernels_without_a_launcher_are_known_by_their_names():
    names = ["residual_adaln_modulate_kernel_bf16", "adaln_modulate_fwd", "nvjet_tst_64x8", "Memcpy DtoD", "sm90_GEMM"]
    spans = device_spans([Event(i, i + 1, name) for i, name in enumerate(names)], [])
    assert [span.operator for span in spans] == [
        "residual_adaln_modulate",
        "adaln_modulate",
        "matrix products",
        "other",
        "matrix products",
    ]


def test_kernels_that_run_at_the_same_time_count_once():
    kernels = [Event(0, 10, "a", "aten::mm"), Event(2, 4, "b", "aten::gelu"), Event(8, 12, "c", "aten::gelu")]
    spans = device_spans(kernels, [])
    check_apart(spans)
    assert seconds_by_operator(spans) == {"matrix products": 10, "other": 2}


def test_a_picture_merges_what_cannot_be_told_apart():
    a, b = "a", "b"
    spans = [Span(0, 10, a), Span(10.5, 20, a), Span(20, 20.4, b), Span(20.4, 20.5, a), Span(30, 40, a)]
    assert picture(spans, 4000.0) == [Span(0, 20, a), Span(20, 20.5, b), Span(30, 40, a)]
    assert picture([], 1.0) == []


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.sampled_from("abc")), max_size=100),
    st.integers(5, 50),
)
def test_a_picture_has_so_many_spans_and_no_more(steps, most):
    spans, now = [], 0
    for gap, length, operator in steps:
        spans.append(Span(now + gap, now + gap + length, operator))
        now += gap + length
    drawn = picture(spans, float(now), most)
    assert len(drawn) <= most
    check_apart(drawn)
    if spans:
        assert drawn[0].begin == spans[0].begin
        assert drawn[-1].end == spans[-1].end
        # no long span is lost in its neighbours
        operators = {span.operator for span in drawn}
        assert {span.operator for span in spans if span.end - span.begin > now / 2} <= operators


def event(category, name, begin_us, end_us, tid=1, id=None):
    args = {} if id is None else {"External id": id}
    times = {"ts": 5e9 + begin_us, "dur": end_us - begin_us}
    return {"ph": "X", "cat": category, "name": name, "tid": tid, "args": args, **times}


def test_a_trace_of_a_gpu():
    trace = [
        {"ph": "M", "name": "process_name", "ts": 0, "args": {}},
        event("user_annotation", "whole", 0, 1000),
        event("user_annotation", "scale:0:1", 10, 30),  # when it was launched, not when it ran
        event("cpu_op", "aten::addmm", 12, 14, id=7),
        event("user_annotation", "op:qk_norm", 15, 16),
        event("gpu_user_annotation", "scale:0:1", 100, 300, tid=7),
        event("gpu_user_annotation", "op:qk_norm", 200, 300, tid=7),
        event("gpu_user_annotation", "part:decoder", 400, 900, tid=7),
        event("kernel", "sm90", 100, 180, tid=7, id=7),
        event("kernel", "k", 200, 300, tid=7, id=8),
        event("gpu_memcpy", "Memcpy", 400, 410, tid=7),
        event("cuda_runtime", "cudaDeviceSynchronize", 20, 900),
    ]
    found = timeline_of_trace(trace)
    assert found["total_s"] == pytest.approx(1e-3)
    assert found["totals_s"] == {
        IDLE: pytest.approx(810e-6),
        "qk_norm": pytest.approx(100e-6),
        "matrix products": pytest.approx(80e-6),
        "other": pytest.approx(10e-6),
    }
    assert found["spans"] == [
        {"operator": "matrix products", "begin_s": 100e-6, "seconds": 80e-6},
        {"operator": "qk_norm", "begin_s": 200e-6, "seconds": 100e-6},
        {"operator": "other", "begin_s": 400e-6, "seconds": 10e-6},
    ]
    assert found["scales"] == [{"scale": 0, "patch_num": 1, "begin_s": 100e-6}]
    assert found["decoder"] == {"begin_s": 400e-6, "seconds": 500e-6}


def test_a_trace_of_a_cpu_counts_the_calling_thread_only():
    trace = [
        event("user_annotation", "whole", 0, 1000),
        event("cpu_op", "aten::mm", 100, 300),
        event("cpu_op", "aten::mm", 400, 900, tid=2),
    ]
    found = timeline_of_trace(trace)
    assert found["totals_s"] == {IDLE: pytest.approx(800e-6), "matrix products": pytest.approx(200e-6)}
    assert found["scales"] == [] and found["decoder"] is None


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two wait for each other ten times as long as they work where another program has one of their cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def library():
    modules = (autoencoder.group_norm_silu, block.adaln_modulate, block.qk_norm, quantizer.pyramid_update)
    return modules + (VAR.sample_scales, VQVAE.fhat_to_img)


@pytest.fixture(scope="module")
def var():
    return load_checkpoint("demo").var


def test_one_image_of_the_demo_model(var, capfd):
    before = library()
    sampler = Sampler(var, dtype="float32", device="cpu")
    images = []
    found = record(lambda: images.append(sampler.sample([3], [5])), "cpu", "one image")
    assert library() == before
    assert torch.equal(images[0], sampler.sample([3], [5]))
    assert capfd.readouterr() == ("", "")  # the profiler has nothing to say

    assert list(found) == ["title", "total_s", "spans", "totals_s", "scales", "decoder"]
    assert found["title"] == "one image"
    ran = {
        "residual_adaln_modulate",
        "qk_norm",
        "scale_attention",
        "sample_tokens",
        "pyramid_update",
        "group_norm_silu",
    }
    classes = {"matrix products", "convolution", "attention", "other", IDLE}
    assert set(found["totals_s"]) == ran | classes
    assert all(seconds > 0 for seconds in found["totals_s"].values())
    assert sum(found["totals_s"].values()) == pytest.approx(found["total_s"], rel=1e-6)

    spans = found["spans"]
    assert 20 < len(spans) <= timeline.MOST_SPANS
    ends = [span["begin_s"] + span["seconds"] for span in spans]
    assert all(end <= span["begin_s"] + 1e-6 for end, span in zip(ends, spans[1:]))
    assert spans[0]["begin_s"] >= 0 and ends[-1] <= found["total_s"] + 1e-6

    assert [(scale["scale"], scale["patch_num"]) for scale in found["scales"]] == list(enumerate(var.patch_nums))
    begins = [scale["begin_s"] for scale in found["scales"]] + [found["decoder"]["begin_s"]]
    assert begins == sorted(begins)
    assert begins[-1] + found["decoder"]["seconds"] <= found["total_s"]
    # the convolutions are in the decoder, the attention of the transformer is not
    convolutions = [span for span in spans if span["operator"] == "convolution"]
    assert convolutions and all(span["begin_s"] >= begins[-1] - 1e-3 for span in convolutions)
    json.dumps(found, allow_nan=False)


def test_the_library_is_restored_after_an_error(var):
    before = library()
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, "cpu", "nothing")
    assert library() == before


def test_the_published_call_and_streams_have_scales_too(var):
    found = record(lambda: var.autoregressive_infer_cfg(1, 3, g_seed=0), "cpu", "published")
    assert len(found["scales"]) == len(var.patch_nums)
    assert found["totals_s"]["pyramid_update"] > 0
    stream = Sampler(var, dtype="float32").stream([3], [5])
    found = record(lambda: list(stream), "cpu", "stream")
    assert len(found["scales"]) == len(var.patch_nums)
