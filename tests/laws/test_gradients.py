"""The gradient is the adjoint: along any direction v,  <gradient, v>  is the slope of  <dy, f>.

The slope is measured by central differences with one step of Richardson's extrapolation, so it errs by h^4 and by rounding over h.
What is differentiated is `method.differentiated`, the function a method promises the gradient of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_ref import stack
from peft_ref.conditioned import Conditioned
from peft_ref.errors import NotMergeableError
from peft_ref.stack import Adapter, Dropout
from tests.laws.strategies import LAW, PAIRS, Case, Host, cases, companion

STEP = 2e-3


def slope(f: Callable[[float], float]) -> float:
    """f'(0), from the step whose two orders agree best: a steep f, or one with an edge near 0, wants a smaller one."""

    def central(h: float) -> float:
        return (f(h) - f(-h)) / (2 * h)

    found = []
    for step in (STEP, STEP / 16, STEP / 256):
        whole, half = central(step), central(step / 2)
        found.append((abs(whole - half), (4 * half - whole) / 3))
        if abs(whole - half) <= 1e-6 * (1 + abs(half)):
            break
    return min(found)[1]


def assert_slope(f: Callable[[float], float], gradient: Host, direction: Host, what: str) -> None:
    assert gradient.shape == direction.shape, f"{what}: gradient {gradient.shape}, parameter {direction.shape}"
    promised, measured = float(np.sum(gradient * direction)), slope(f)
    size = 1.0 + float(np.sum(np.abs(gradient * direction))) + abs(f(0.0)) + abs(measured)
    assert abs(promised - measured) <= 1e-7 * size, f"{what}: the gradient says {promised}, differences say {measured}"


def function(case: Case, p: Any) -> Callable[[Any, Host], Host]:
    """(q, x) -> y, the layer with the adapter: through the weight or, where the weight cannot hold the adapter, beside it."""
    layer, W, b = case.layer, case.W, case.b
    weight = case.method.differentiated(layer, p, W)
    for bias in (b, np.zeros(layer.shape[0])):  # what adds to a bias that is not there acts as on one of zeros
        try:
            weight(p, W, bias)
        except NotMergeableError:
            continue
        return lambda q, x: layer.apply(x, *weight(q, W, bias))
    return lambda q, x: stack.forward(layer, W, b, [Adapter(case.method, q)], x)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_stack_vjp_is_the_adjoint_for_every_parameter(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    p, x, dy = case.params(), case.x, case.dy
    v, f = case.direction(p, 7), function(case, p)
    got = stack.vjp(case.layer, case.W, case.b, [Adapter(case.method, p)], x, dy).params[0]
    assert [field for field in p._fields if getattr(got, field) is not None] == [field for field in p._fields if field in case.trained]
    for field in case.trained:
        at, along = getattr(p, field), getattr(v, field)
        assert_slope(lambda t: float(np.sum(dy * f(p._replace(**{field: at + t * along}), x))), getattr(got, field), along, field)  # noqa: B023


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] != "embedding"])
@given(data=st.data())
@LAW
def test_stack_vjp_is_the_adjoint_for_the_input(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    p, x, dy, v = case.params(), case.x, case.dy, case.numbers(8, case.shape)
    f = function(case, p)
    got = stack.vjp(case.layer, case.W, case.b, [Adapter(case.method, p)], x, dy).x
    assert got is not None
    assert_slope(lambda t: float(np.sum(dy * f(p, x + t * v))), got, v, "x")


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_under_other_adapters_the_gradient_is_still_the_adjoint(name: str, kind: str, data: st.DataObject) -> None:
    """The gradient of the lowest adapter goes back through all those above it."""
    case = data.draw(cases(name, kind))
    layer, W0, dy, p = case.layer, case.W, case.dy, case.params()
    above = [companion(data, case, 21), companion(data, case, 22)]
    maps = [_promised(case, a) for a in (Adapter(case.method, p), *above)]

    def y(q: Any) -> Host:
        W, b = W0, case.b
        for params, step in zip((q, *(a.params for a in above)), maps, strict=True):
            W, b = step(params, W, b)
        return np.asarray(layer.apply(case.x, W, b))

    try:
        y(p)
    except NotMergeableError:
        return
    got = stack.vjp(layer, W0, case.b, [Adapter(case.method, p), *above], case.x, dy).params[0]
    v = case.direction(p, 18)
    for field in case.trained:
        at, along = getattr(p, field), getattr(v, field)
        assert_slope(lambda t: float(np.sum(dy * y(p._replace(**{field: at + t * along})))), getattr(got, field), along, field)  # noqa: B023


def _promised(case: Case, a: Adapter) -> Any:
    """What is differentiated, in a stack: a conditioned method reads the bias under it."""
    if isinstance(a.method, Conditioned):
        return lambda q, W, b: stack.step(case.layer, a._replace(params=q), W, b, case.W, case.b)
    return a.method.differentiated(case.layer, a.params, case.W)


@pytest.mark.parametrize("name", [name for name, kind in PAIRS if kind == "embedding"])
@given(data=st.data())
@LAW
def test_an_embedding_has_no_gradient_for_its_input(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, "embedding"))
    assert stack.vjp(case.layer, case.W, None, [Adapter(case.method, case.params())], case.x, case.dy).x is None


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_weight_vjp_is_the_adjoint_for_parameters_weight_and_bias(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    layer, p, b, W0 = case.layer, case.params(), case.b, case.W
    W = W0 + case.numbers(9, layer.shape) / 2  # what an adapter below made of the frozen weight
    dW, db = case.numbers(10, layer.shape), None if b is None else case.numbers(11, b.shape)
    f = case.method.differentiated(layer, p, W0)
    try:
        f(p, W, b)
    except NotMergeableError:
        return
    got = case.method.weight_vjp(layer, p, W, b, W0, dW, db)

    def value(q: Any, W: Host, b: Host | None) -> float:
        W1, b1 = f(q, W, b)
        return float(np.sum(dW * W1)) + (0.0 if b1 is None or db is None else float(np.sum(db * b1)))

    v = case.direction(p, 12)
    for field in case.trained:
        at, along = getattr(p, field), getattr(v, field)
        assert_slope(lambda t: value(p._replace(**{field: at + t * along}), W, b), getattr(got.params, field), along, field)  # noqa: B023
    vW = case.numbers(13, W.shape)
    assert_slope(lambda t: value(p, W + t * vW, b), got.W, vW, "W")
    if b is not None:
        vb = case.numbers(14, b.shape)
        assert got.b is not None
        assert_slope(lambda t: value(p, W, b + t * vb), got.b, vb, "b")


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_what_is_differentiated_has_the_value_of_the_weight(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    layer, p, W0, b = case.layer, case.params(), case.W, case.b
    W = W0 + case.numbers(9, layer.shape) / 2
    try:
        expected = case.method.weight(layer, p, W, b, W0)
    except NotMergeableError:
        return
    for got, want in zip(case.method.differentiated(layer, p, W0)(p, W, b), expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] != "embedding"])
@given(data=st.data())
@LAW
def test_with_dropout_the_gradient_is_still_the_adjoint(name: str, kind: str, data: st.DataObject) -> None:
    """y = layer(x; W, b') + layer(drop(x); T(W) - W): both are linear in x, and T is differentiated as it promises."""
    case = data.draw(cases(name, kind))
    layer, W, b, p, x, dy = case.layer, case.W, case.b, case.params(), case.x, case.dy
    p_drop = 0.25
    mask = (np.random.default_rng([case.seed, 15]).random(x.shape) >= p_drop).astype(x.dtype)
    weight = case.method.differentiated(layer, p, W)
    try:
        weight(p, W, b)
    except NotMergeableError:
        return

    def y(q: Any, x: Host) -> Host:
        kept, dropped = case.method.apart(q) or (None, q)
        W1, b1 = weight(dropped, W, b)
        under = W if kept is None else weight(kept, W, b)[0]  # where dropout does not reach all
        return layer.apply(x, under, b1) + layer.apply(x * mask / (1 - p_drop), W1 - W, None)

    got = stack.vjp(layer, W, b, [Adapter(case.method, p, Dropout(mask, p_drop))], x, dy)
    v, vx = case.direction(p, 16), case.numbers(17, x.shape)
    total = sum(float(np.sum(getattr(got.params[0], f) * getattr(v, f))) for f in case.trained) + float(np.sum(got.x * vx))
    moved = slope(lambda t: float(np.sum(dy * y(case.moved(p, t, v), x + t * vx))))
    assert abs(total - moved) <= 1e-6 * (1 + abs(moved) + float(np.sum(np.abs(dy)))), f"the gradient says {total}, differences say {moved}"


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] != "embedding"])
@given(data=st.data())
@LAW
def test_the_gradient_for_the_frozen_bias_is_the_adjoint(name: str, kind: str, data: st.DataObject) -> None:
    """Under one or two adapters, the last of which may have dropout."""
    case = data.draw(cases(name, kind))
    mask = (np.random.default_rng([case.seed, 15]).random(case.shape) >= 0.25).astype(case.x.dtype)
    adapters = [companion(data, case, 21)] if data.draw(st.booleans()) else []
    adapters += [Adapter(case.method, case.params(), Dropout(mask, 0.25) if data.draw(st.booleans()) else None)]

    def y(b: Host | None) -> Host:
        return np.asarray(stack.forward(case.layer, case.W, b, adapters, case.x))

    try:
        y(case.b)
    except NotMergeableError:
        return
    got = stack.vjp(case.layer, case.W, case.b, adapters, case.x, case.dy).b
    assert (got is None) == (case.b is None)
    if case.b is not None and got is not None:
        v = case.numbers(19, case.b.shape)
        assert_slope(lambda t: float(np.sum(case.dy * y(case.b + t * v))), got, v, "b")
