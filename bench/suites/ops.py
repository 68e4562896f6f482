"""The suite of operators: each on its own, forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import var_fast.ops
from bench.backends import use_backend
from bench.case import CannotRun, Case, Implementation, Implementations
from bench.ops.checks import GRADIENT_TOLERANCE, check_all_close
from bench.ops.operator import Operator, operators
from var_fast.errors import UserError
from var_fast.ops.backend import FAST_BACKENDS, choose_backend

REPORT_SIZE = {"cpu": "quick", "cuda": "full"}
"""Which of an operator's shapes a report measures on a device."""
MOST_SETS = 64
"""Of rotated inputs: small tensors stay in the cache in real use too."""


@dataclass
class OpSubject:
    """`backward`: a call is forward and backward, and returns (outputs, gradients of the differentiable arguments)."""

    operator: Operator
    shape: dict[str, Any]
    backward: bool
    expected: Any = field(default=None, repr=False)  # of the first inputs, in float64: see float64_expected


def cases(
    device: torch.device,
    dtype: torch.dtype,
    size: str,
    names: Sequence[str] | None = None,
    cache_bytes: int = 64 * 2**20,
    only: Sequence[str] = (),
) -> Iterator[Case]:
    """Every operator at every shape of `size` ("small", "quick", "full"), each case's inputs made when its turn comes.

    `names`: only these operators; `only`: only cases whose name contains one of these texts, all if there are none.
    `cache_bytes`: the last-level cache; sets of inputs are made until twice as much. Raises UserError for an unknown
    operator.
    """
    plans = (plan for plan in _plans(size, names) if dtype == torch.float32 or not plan.operator.float32_only)
    wanted = (plan for plan in plans if not only or any(text in _name(plan) for text in only))
    return (_case(subject, device, dtype, cache_bytes) for subject in wanted)


def _plans(size: str, names: Sequence[str] | None = None) -> list[OpSubject]:
    known = {operator.name: operator for operator in operators()}
    for name in names or ():
        if name not in known:
            raise UserError(f"there is no operator {name!r}, expected one of {', '.join(known)}")
    return [
        OpSubject(known[name], shape, backward)
        for name in names or known
        for shape in known[name].shapes[size]
        for backward in ([False, True] if known[name].differentiable else [False])
    ]


def check_only(only: Sequence[str], device: torch.device) -> None:
    """Raises UserError for a text that no case of a report has in its name."""
    names = [_name(plan) for plan in _plans(REPORT_SIZE[device.type])]
    for text in only:
        if not any(text in name for name in names):
            raise UserError(f"--only is {text!r}, which no operator's case has in its name, such as {names[0]!r}")


def as_implementation(case: Case, function: Callable) -> Implementation:
    """`function`, which has the operator's signature, as what runs the case, held to the float64 reference."""
    return Implementation(partial(_run, case.subject, function), float64_expected(case))


def reference_function(case: Case) -> Callable:
    return getattr(var_fast.ops, f"{case.subject.operator.name}_reference")


def reference_implementation(case: Case) -> Implementation:
    reference = reference_function(case)

    def run(*args, **kwargs):
        # a reference that calls another operator gets that one's reference
        with use_backend("reference"):
            return reference(*args, **kwargs)

    return as_implementation(case, run)


def backend_implementations(case: Case) -> Implementations:
    """Every fast backend of the operator that this version has, by its name."""
    name, found = case.subject.operator.name, {}
    for backend in FAST_BACKENDS[name]:
        try:
            choose_backend(name, case.device, backend, partial(_no_gradient, case.subject))
        except UserError as problem:
            found[backend] = CannotRun(str(problem))
        else:
            found[backend] = as_implementation(case, partial(getattr(var_fast.ops, name), backend=backend))
    return found


def _no_gradient(subject: OpSubject) -> str | None:
    return "it has no gradient" if subject.backward else None


def float64_expected(case: Case) -> Callable:
    """What any implementation is held to: the reference in float64, or what the operator's `exact` makes of it.

    Of the case's first inputs it is computed once for all implementations.
    """
    subject = case.subject
    exact = subject.operator.exact or reference_function(case)

    def compute(args, kwargs, upstream):
        args, upstream = [_double(x) for x in args], [_double(x) for x in upstream]
        kwargs = {name: _double(x) for name, x in kwargs.items()}
        with use_backend("reference"):
            return _run(subject, exact, args, kwargs, upstream)

    def expected(args, kwargs, upstream):
        if args is not case.inputs[0][0]:
            return compute(args, kwargs, upstream)
        if subject.expected is None:
            subject.expected = compute(args, kwargs, upstream)
        return subject.expected

    return expected


def _case(subject: OpSubject, device: torch.device, dtype: torch.dtype, cache_bytes: int) -> Case:
    operator, shape = subject.operator, subject.shape
    return Case(
        suite="ops",
        name=_name(subject),
        device=device,
        dtype=dtype,
        batch=shape["B"],
        images=0,
        work=operator.work(shape, dtype, subject.backward),
        inputs=_rotated_inputs(subject, device, dtype, cache_bytes),
        subject=subject,
        check=partial(_check, subject, dtype),
    )


def _name(subject: OpSubject) -> str:
    direction = "forward + backward" if subject.backward else "forward"
    return f"{subject.operator.name} {direction} {_shape_text(subject.shape)}"


def _shape_text(shape: dict[str, Any]) -> str:
    """1x680x1024, and what is no dimension of a tensor by its name: 1x32x16x16 pn=10."""
    dimensions = "x".join(str(size) for name, size in shape.items() if len(name) == 1)
    return " ".join([dimensions, *(f"{name}={value}" for name, value in shape.items() if len(name) > 1)])


def _rotated_inputs(
    subject: OpSubject, device: torch.device, dtype: torch.dtype, cache_bytes: int
) -> list[tuple[tuple, dict, list]]:
    """Sets of (args, kwargs, upstream gradients), at least two, until they are twice the cache."""
    generator = torch.Generator(device).manual_seed(0)
    outputs = None
    sets, size = [], 0
    while len(sets) < 2 or (size <= 2 * cache_bytes and len(sets) < MOST_SETS):
        args, kwargs = subject.operator.make(subject.shape, dtype, device, generator)
        if subject.backward and outputs is None:
            outputs = _outputs(subject, args, kwargs)
        upstream = [_upstream(output, generator) for output in outputs or ()]
        sets.append((args, kwargs, upstream))
        size += sum(x.nbytes for x in (*args, *kwargs.values(), *upstream) if isinstance(x, torch.Tensor))
    return sets


def _outputs(subject: OpSubject, args: tuple, kwargs: dict) -> list[torch.Tensor | None]:
    """What the operator returns, to draw gradients for; None for what has no gradient."""
    reference = getattr(var_fast.ops, f"{subject.operator.name}_reference")
    with use_backend("reference"):
        outputs = _tuple(reference(*_with_leaves(subject, args)[0], **kwargs))
    return [output.detach() if output.requires_grad else None for output in outputs]


def _upstream(output: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor | None:
    """A random gradient in the layout of `output`; of a loss it is 1."""
    if output is None:
        return None
    return torch.empty_like(output).normal_(generator=generator) if output.dim() else torch.ones_like(output)


def _run(subject: OpSubject, function: Callable, args: Sequence, kwargs: dict, upstream: Sequence) -> Any:
    """One call: the same for every implementation, and for the float64 reference."""
    if not subject.backward:
        args = list(args)
        changed = subject.operator.in_place
        for i in changed:
            args[i] = args[i].clone()
        result = function(*args, **kwargs)
        return (*_tuple(result), *(args[i] for i in changed)) if changed else result
    args, leaves = _with_leaves(subject, args)
    outputs = function(*args, **kwargs)
    graded = [(output, gradient) for output, gradient in zip(_tuple(outputs), upstream) if gradient is not None]
    gradients = torch.autograd.grad([o for o, _ in graded], leaves, [g for _, g in graded])
    return _detached(outputs), gradients


def _with_leaves(subject: OpSubject, args: Sequence) -> tuple[list, list[torch.Tensor]]:
    """The arguments, fresh leaves of a graph where they are differentiable; and these leaves."""
    args = list(args)
    for i in subject.operator.differentiable:
        args[i] = args[i].detach().requires_grad_()
    return args, [args[i] for i in subject.operator.differentiable]


def _detached(outputs):
    return outputs.detach() if isinstance(outputs, torch.Tensor) else tuple(output.detach() for output in outputs)


def _check(subject: OpSubject, dtype: torch.dtype, result: Any, expected: Any) -> None:
    if not subject.backward:
        subject.operator.compare(result, expected, dtype)
        return
    (outputs, gradients), (expected_outputs, expected_gradients) = result, expected
    subject.operator.compare(outputs, expected_outputs, dtype)
    names = [f"the gradient of argument {i}" for i in subject.operator.differentiable]
    check_all_close(names, gradients, expected_gradients, GRADIENT_TOLERANCE[dtype])


def _tuple(outputs):
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
