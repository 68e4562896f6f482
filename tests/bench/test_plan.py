"""What is measured by default, and bad options."""

import pytest
import torch

from bench import plan
from bench.plan import Group, plan_dtypes, plan_groups, plan_list, plan_numbers
from var_fast.errors import UserError

CPU = torch.device("cpu")
SUITES = list(plan.SUITES)


def test_a_quick_report_has_every_suite_and_ends_with_the_long_ones():
    groups = plan_groups(SUITES, None, None, CPU, quick=True)
    assert {group.suite for group in groups} == set(SUITES)
    assert groups[0] == Group("ops", None, 0) and groups[-1] == Group("sample", "d16", 1)


def test_named_models_are_measured_in_every_suite_that_is_asked_for():
    groups = plan_groups(["train", "sample"], ["d20"], None, CPU, quick=True)
    assert groups == [Group("train", "d20", 1), Group("sample", "d20", 1)]
    groups = plan_groups(["sample"], ["d16", "demo"], [2, 4], CPU, quick=True)
    assert groups == [Group("sample", model, batch) for model in ("d16", "demo") for batch in (2, 4)]


def test_a_gpu_gets_large_batches():
    groups = plan_groups(["sample"], None, None, torch.device("cuda"), quick=False)
    assert Group("sample", "d30", 64) in groups


def test_dtypes(monkeypatch):
    monkeypatch.setattr(plan, "computes_in_bfloat16", lambda device: True)
    assert plan_dtypes("auto", CPU) == [torch.float32, torch.bfloat16]
    monkeypatch.setattr(plan, "computes_in_bfloat16", lambda device: False)
    assert plan_dtypes("auto", CPU) == [torch.float32]
    assert plan_dtypes("float16, float32,float16", CPU) == [torch.float16, torch.float32]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: plan_dtypes("float8", CPU), "--dtype holds 'float8'"),
        (lambda: plan_list("--suite", "sampling", plan.SUITES), "--suite holds 'sampling'"),
        (lambda: plan_numbers("--batch", "1,0"), "--batch holds '0'"),
        (lambda: plan_numbers("--batch", "1;2"), "--batch holds '1;2'"),
        (lambda: plan_numbers("--batch", "99999999999999999999"), "--batch holds"),
        (lambda: plan_numbers("--batch", ""), "--batch holds ''"),
    ],
)
def test_bad_options_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call()
