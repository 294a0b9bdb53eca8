"""Every backend gives NumPy's float64 numbers, in its own dtype, and leaves its arguments alone.

The laws of mathematics are tried on NumPy; a backend that agrees with NumPy keeps them too. What is expected of a narrower dtype is
NumPy's float64 answer for the same, already rounded, inputs: float32 arithmetic may be off by some hundred roundings, and a 16-bit result
by one more rounding of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_ref import stack
from peft_ref.backend import Backend, compute_dtype
from peft_ref.errors import NotMergeableError
from peft_ref.stack import Adapter
from tests.laws.compare import assert_same_bits
from tests.laws.strategies import LAW_ON_BACKEND, PAIRS, Case, Host, cases
from tests.methods import facts

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ROUNDINGS = 300


def arguments(case: Case) -> dict[str, Host]:
    params = {f"params.{field}": value for field, value in case.params()._asdict().items() if value is not None}
    b = {} if case.b is None else {"b": case.b}
    return {"W": case.W, "x": case.x, "dy": case.dy, **b, **params}


def results(case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """Every operation of the stack on the arrays `given`, by name."""
    layer, W, b = case.layer, given["W"], given.get("b")
    params = type(case.params())(**{field: given.get(f"params.{field}") for field in case.params()._fields})
    adapters = [Adapter(case.method, params)]
    y = stack.forward(layer, W, b, adapters, given["x"])
    gradients = stack.vjp(layer, W, b, adapters, given["x"], given["dy"])
    found: dict[str, Any] = {"y": y, "dx": gradients.x}
    found |= {f"d{field}": value for field, value in gradients.params[0]._asdict().items()}
    try:
        W1, b1 = stack.merge(layer, W, b, adapters)
        W2, b2 = stack.unmerge(layer, W1, b1, adapters, W, b)
        found |= {"merged W": W1, "merged b": b1, "unmerged W": W2, "unmerged b": b2}
    except NotMergeableError:
        pass
    packed = case.method.pack(layer, params)
    found |= packed
    found |= {f"unpacked {field}": value for field, value in case.method.unpack(layer, packed)._asdict().items()}
    return {name: value for name, value in found.items() if value is not None}


def on(backend: Backend, case: Case, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments on the backend, and the results."""
    with backend.scope():
        sent = {name: backend.from_numpy(value, dtype) for name, value in arguments(case).items()}
        got = results(case, sent)
        return sent, dict(zip(got, backend.settle(list(got.values())), strict=True))


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW_ON_BACKEND
def test_a_backend_agrees_with_numpy_in_float64(backend: Backend, name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, few=True))
    for dtype in (*backend.held, data.draw(st.sampled_from(backend.dtypes[::-1]))):
        sent, got = on(backend, case, dtype)
        expected = results(case, {name: backend.to_numpy(value, dtype) for name, value in sent.items()})
        assert got.keys() == expected.keys()
        for what, want in expected.items():
            back = backend.to_numpy(got[what], dtype)
            assert back.shape == want.shape, f"{what}: shape {back.shape}, expected {want.shape}"
            size = max(1.0, float(np.max(np.abs(want), initial=0.0)))
            allowed = ROUNDINGS * UNIT[compute_dtype(dtype)] * size + (0.0 if dtype in backend.held else UNIT[dtype] * np.abs(want))
            off = np.abs(back - want)
            assert np.all(off <= allowed), f"{what} in {dtype} is off by {np.max(off)}: got {back}, expected {want}"


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW_ON_BACKEND
def test_a_backend_computes_in_the_dtype_it_was_given(backend: Backend, name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, few=True))
    dtype = backend.held[-1]  # the narrowest, where an upcast shows
    _, got = on(backend, case, dtype)
    found = {what: backend.dtype_of(value) for what, value in got.items()}
    floats = {what: held for what, held in found.items() if not held.startswith("int")}  # places stay integers
    assert floats == dict.fromkeys(floats, dtype)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW_ON_BACKEND
def test_on_a_backend_no_argument_is_written_into(backend: Backend, name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, few=True))
    dtype = backend.dtypes[0]
    with backend.scope():
        sent = {name: backend.from_numpy(value, dtype) for name, value in arguments(case).items()}
        before = {name: backend.to_numpy(value, dtype).copy() for name, value in sent.items()}
        for value in backend.settle(list(results(case, sent).values())):
            backend.fetch(value)
        case.method.init(case.layer, sent["W"], np.random.default_rng([case.seed, 30]))
    for what, value in sent.items():
        assert_same_bits(backend.to_numpy(value, dtype), before[what], what)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW_ON_BACKEND
def test_on_a_backend_a_fresh_adapter_starts_from_numpys_bits(backend: Backend, name: str, kind: str, data: st.DataObject) -> None:
    """Randomness is drawn by NumPy and moved across. What is computed from W by the library's own linalg has the same product."""
    case = data.draw(cases(name, kind, fresh=True, few=True))
    dtype = backend.dtypes[0]
    with backend.scope():
        W = backend.from_numpy(case.W, dtype)
        start = case.method.init(case.layer, W, np.random.default_rng([case.seed, 30]))
    host_W = backend.to_numpy(W, dtype)
    expected = case.method.init(case.layer, host_W, np.random.default_rng([case.seed, 30]))
    tolerance = ROUNDINGS * UNIT[dtype]
    np.testing.assert_allclose(backend.to_numpy(start.W, dtype), expected.W, rtol=0, atol=10 * tolerance)
    params = {field: value for field, value in start.params._asdict().items() if value is not None}
    back = {field: backend.to_numpy(value, dtype) for field, value in params.items()}
    wanted = expected.params._asdict()
    if getattr(case.method, "init_lora_weights", True) in ("pissa", "olora"):  # singular vectors have no sign of their own
        np.testing.assert_allclose(back["B"] @ back["A"], wanted["B"] @ wanted["A"], rtol=0, atol=10 * tolerance)
        return
    if (free := facts(name).without_signs) is not None:
        back, wanted, tolerance = dict(free(back)), dict(free(wanted)), 10 * tolerance
    for field, value in back.items():
        np.testing.assert_allclose(value, wanted[field], rtol=0, atol=tolerance * max(1.0, float(np.max(np.abs(wanted[field])))))
