"""A method computes in the library that its arrays are of: tried on array-api-strict, whose arrays and NumPy's refuse to be mixed.

One layer of each kind and one adapter: `test_on_backends` has the numbers of every library, and more of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from peft_ref import stack
from peft_ref.errors import NotMergeableError
from peft_ref.layers import Linear
from peft_ref.methods import METHODS, AdaLoRA, PVeRA
from peft_ref.methods.adalora_allocator import State, after_step, sliced
from peft_ref.stack import Adapter
from tests.laws.compare import assert_close
from tests.laws.strategies import LAW_ON_BACKEND, PAIRS, Case, cases
from tests.methods import small

strict = pytest.importorskip("array_api_strict")
ONE = settings(LAW_ON_BACKEND, max_examples=1, phases=[Phase.generate], derandomize=True, database=None)


def sent(value: Any) -> Any:
    """NumPy's arrays as strict ones, within tuples and maps."""
    if isinstance(value, dict):
        return {name: sent(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return type(value)(*map(sent, value))
    return strict.asarray(value) if isinstance(value, np.ndarray) else value


def assert_alike(got: Any, expected: Any, what: str) -> None:
    """The same numbers in strict arrays, within tuples and maps."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
    if isinstance(expected, dict | tuple):
        for name in expected if isinstance(expected, dict) else range(len(expected)):
            assert_alike(got[name], expected[name], f"{what}, {name}")
    elif isinstance(expected, np.ndarray):
        assert type(got) is type(strict.asarray(0)), f"{what} is a {type(got)}"
        assert_close(np.from_dlpack(got).astype(float), expected.astype(float), what, rounding=1e-9)
    else:
        assert got == expected, what


def done(case: Case, params: Any, W: Any, b: Any, x: Any, dy: Any) -> tuple[Any, ...]:
    adapters = [Adapter(case.method, params)]
    y, gradients = stack.forward(case.layer, W, b, adapters, x), stack.vjp(case.layer, W, b, adapters, x, dy)
    try:
        merged = stack.merge(case.layer, W, b, adapters)
        back = stack.unmerge(case.layer, *merged, adapters, W, b)
    except NotMergeableError:
        merged = back = ()
    return y, gradients.x, gradients.params[0], merged, back


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@ONE
def test_every_result_is_of_the_library_of_the_arguments(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, few=True))
    given = case.params(), case.W, case.b, case.x, case.dy
    assert_alike(done(case, *map(sent, given[:1]), *map(sent, given[1:])), done(case, *given), name)


@pytest.mark.parametrize("name", [name for name, cls in METHODS.weights.items() if "linear" in cls.kinds])
def test_every_start_is_of_the_library_of_the_weights(name: str) -> None:
    method, layers = small(name), {f"layers.{i}.q": Linear(in_features=8, out_features=4) for i in range(2)}
    weights = {layer: np.random.default_rng(i).normal(size=(4, 8)) for i, layer in enumerate(layers)}
    for given in (weights, sent(weights)):
        common = method.common(layers, given, np.random.default_rng(2))
        for layer, W in given.items():
            start = method.start(layers[layer], W, np.random.default_rng(3), common.get(layer))
            for array in (*start.params, start.W):
                assert array is None or type(array) is type(W), name


def test_adaloras_allocator_computes_in_the_library_of_the_parameters() -> None:
    method = AdaLoRA(init_r=3, target_r=1, total_step=4, deltaT=1)
    layer, rng = Linear(in_features=5, out_features=4), np.random.default_rng(0)
    params, grads = ({n: method.init(layer, rng.normal(size=(4, 5)), rng).params for n in "ab"} for _ in range(2))
    params = {n: p._replace(E=rng.normal(size=(3, 1)), B=rng.normal(size=(4, 3))) for n, p in params.items()}
    grads = {n: p._replace(A=rng.normal(size=(3, 5)), E=rng.normal(size=(3, 1)), B=rng.normal(size=(4, 3))) for n, p in grads.items()}
    ours: Any = State(), params
    theirs: Any = State(), sent(params)
    for step in range(6):
        ours, theirs = after_step(method, *ours, grads, step), after_step(method, *theirs, sent(grads), step)
        assert_alike(theirs, ours, f"step {step}")
    kept = [True, False, True]
    assert_alike(sliced(method, sent(params["a"]), kept)[1], sliced(method, params["a"], kept)[1], "a slice")


def test_pveras_noise_acts_in_the_library_of_the_input() -> None:
    layer, rng = Linear(in_features=5, out_features=4), np.random.default_rng(0)
    method = PVeRA(r=2, widest_in=6, widest_out=7)
    p = method.to_params(b=rng.normal(size=4), d=rng.normal(size=4), A=rng.normal(size=(4, 6)), B=rng.normal(size=(7, 2)))
    x, noise, dy = rng.normal(size=(3, 5)), rng.normal(size=(3, 2)), rng.normal(size=(3, 4))
    assert_alike(method.sampled(layer, sent(p), sent(x), sent(noise)), method.sampled(layer, p, x, noise), "y")
    got = method.sampled_vjp(layer, sent(p), sent(x), sent(noise), sent(dy))
    assert_alike(got, method.sampled_vjp(layer, p, x, noise, dy), "gradients")
