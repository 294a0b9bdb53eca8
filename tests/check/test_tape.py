"""The tape's gradients are those of calculus: central differences of a long double computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_ref.check import tape
from peft_ref.check.corpus import corpus
from peft_ref.check.mistake import autograd
from peft_ref.check.oracle import Problem, pose
from peft_ref.check.prompting import pose_prompt, used
from peft_ref.stack import forward

Host = np.ndarray[Any, Any]
STEP = 2.0**-20
NUMBERS = st.integers(2, 24).map(lambda n: n / 8)  # away from zero, where roots and quotients are rough


def differences(f: Callable[[Host], Any], x: Host) -> Host:
    """The gradient of the scalar f, entry by entry."""
    x = x.astype(np.longdouble)
    out = np.empty(x.shape)
    for at in np.ndindex(x.shape):
        step = np.zeros(x.shape, np.longdouble)
        step[at] = STEP
        out[at] = float((f(x + step) - f(x - step)) / (2 * STEP))
    return out


def taped(f: Callable[[Host], Any], x: Host) -> Host:
    nodes = tape.tape_array(x)
    y = np.empty((), dtype=object)
    y[()] = f(nodes)
    tape.backward(y, np.ones(()))
    return tape.gradients(nodes)


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "a + b": lambda a, b: a + b,
    "a + 2": lambda a, b: a + 2 + b * 0,
    "2 + a": lambda a, b: 2 + a,
    "a - b": lambda a, b: a - b,
    "2 - a": lambda a, b: 2 - a,
    "-a": lambda a, b: -a,
    "a b": lambda a, b: a * b,
    "3 a": lambda a, b: 3 * a,
    "a a": lambda a, b: a * a,
    "a / b": lambda a, b: a / b,
    "a / 2": lambda a, b: a / 2,
    "2 / b": lambda a, b: 2 / b,
    "tanh a": lambda a, b: np.tanh(np.asarray([a])).reshape(-1)[0],
    "tanh (a - b)": lambda a, b: np.tanh(np.asarray([a - b])).reshape(-1)[0] * b,
    "a where it is positive": lambda a, b: np.sum(np.where((v := np.stack([a - 1.0625, b - 1.0625])) > 0, v * v, 0 * v)),
    "sqrt a": lambda a, b: np.sqrt(np.asarray([a])).reshape(-1)[0],
    "|b - 4|": lambda a, b: abs(b - 4.03125),
    "|a + b|": lambda a, b: abs(a + b),
    "shared": lambda a, b: (c := a * b + a) * c / (c + b),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(a=NUMBERS, b=NUMBERS)
@settings(max_examples=25, deadline=None)
def test_the_gradient_of_an_operation_is_its_difference_quotient(name: str, a: float, b: float) -> None:
    def f(v: Host) -> Any:
        return OPERATIONS[name](v[0], v[1])

    x = np.asarray([a, b])
    np.testing.assert_allclose(taped(f, x), differences(f, x), rtol=1e-8, atol=1e-9)


@given(st.lists(NUMBERS, min_size=12, max_size=12))
@settings(max_examples=25, deadline=None)
def test_the_gradient_of_an_array_expression_is_its_difference_quotient(numbers: list[float]) -> None:
    def f(v: Host) -> Any:
        A, B = v[:6].reshape(2, 3), v[6:].reshape(3, 2)
        C = B @ A + 1.5
        n = np.sqrt(np.sum(C * C, axis=1)).reshape(-1, 1)
        return np.sum((C / n) @ A.T)

    x = np.asarray(numbers)
    np.testing.assert_allclose(taped(f, x), differences(f, x), rtol=1e-7, atol=1e-8)


def test_a_constant_carries_no_gradient() -> None:
    x = np.asarray([2.0, 3.0])
    held = taped(lambda v: v[0] * tape.constant(v[1]) / tape.constant(v[0]), x)
    np.testing.assert_array_equal(held, [1.5, 0.0])
    assert tape.constant(tape.tape_array(x)).dtype == np.float64


def test_gradients_of_several_outputs_add_up_with_their_weights() -> None:
    x = tape.tape_array(np.asarray([2.0, 5.0]))
    y = np.stack([x[0] * x[1], x[0] + x[1]])
    tape.backward(y, np.asarray([10.0, 1.0]))
    np.testing.assert_array_equal(tape.gradients(x), [51.0, 21.0])


def test_an_output_that_is_an_input_keeps_its_own_gradient() -> None:
    x = tape.tape_array(np.asarray([2.0]))
    tape.backward(np.stack([x[0], x[0] * x[0]]), np.asarray([1.0, 1.0]))
    np.testing.assert_array_equal(tape.gradients(x), [5.0])


def test_a_long_chain_does_not_exhaust_the_stack() -> None:
    x = tape.tape_array(np.asarray([1.0]))
    total = x[0]
    for _ in range(5000):
        total = total + x[0]
    tape.backward(np.asarray([total], dtype=object), np.ones(1))
    assert tape.gradients(x)[0] == 5001


# Everything that differentiates through the tape goes through `autograd`: the right forward must give the true gradient there.
PLAIN = [c for c in corpus() if c.operation == "backward" and ".plain." in c.id and c.method != "dora"]
PROMPTS = [c for c in corpus() if c.operation == "prompt_backward"]


@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.id)
def test_autograd_of_the_forward_is_its_difference_quotient(case: Any) -> None:
    def run(p: Problem) -> Host:
        return np.asarray(forward(p.layer, p.W, p.b, p.adapters, p.x))

    got = autograd(case, run)
    p = pose(case)
    for spec in p.adapters[0].method.spec(p.layer):
        field, value = spec.field, getattr(p.adapters[0].params, spec.field)
        if not spec.trained:
            continue

        def at(v: Host, field: str = field) -> Any:
            a = p.adapters[0]
            return np.sum(run(p._replace(adapters=(a._replace(params=a.params._replace(**{field: v})),))) * case.dy)

        np.testing.assert_allclose(got[f"0.{spec.key}"].reshape(value.shape), differences(at, value), rtol=1e-6, atol=1e-7)
    if "x" in got:
        moved = differences(lambda v: np.sum(run(p._replace(x=v)) * case.dy), np.asarray(p.x))
        np.testing.assert_allclose(got["x"], moved, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", PROMPTS, ids=lambda c: c.id)
def test_autograd_of_a_prompt_is_its_difference_quotient(case: Any) -> None:
    """Along one direction of each tensor: a tensor of an encoder has many entries."""
    taped_problem, p = (
        pose_prompt(case, tape.tape_array),
        pose_prompt(case, lambda v: v if v.dtype.kind == "i" else v.astype(np.longdouble)),
    )
    (prompt,) = used(taped_problem.method, taped_problem.method.prompt(taped_problem.tensors, taped_problem.ctx)).values()
    tape.backward(prompt, case.dy)
    rng = np.random.default_rng(1)
    for name, value in p.tensors.items():
        direction = rng.choice([-1.0, 1.0], value.shape)

        def at(step: float, name: str = name, direction: Host = direction) -> Any:
            moved = {**p.tensors, name: p.tensors[name] + step * direction}
            (out,) = used(p.method, p.method.prompt(moved, p.ctx)).values()
            return np.sum(out * case.dy)

        want = float((at(STEP) - at(-STEP)) / (2 * STEP))
        got = tape.gradients(taped_problem.tensors[name])
        assert abs(np.sum(got * direction) - want) <= 1e-7 * (1 + np.sum(np.abs(got))), name
