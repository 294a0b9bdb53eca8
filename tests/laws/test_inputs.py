"""A batch is its rows, arguments are not written into, and float32 stays float32."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_ref import stack
from peft_ref.errors import NotMergeableError
from peft_ref.layers import Conv
from peft_ref.stack import Adapter
from tests.laws.compare import assert_close, assert_same_bits
from tests.laws.strategies import LAW, PAIRS, Case, Host, cases


def rows(case: Case) -> list[tuple[Any, ...]]:
    """Indices of the rows of x that are computed apart; a convolution's row is a batch of one."""
    if isinstance(case.layer, Conv):
        return [(slice(i, i + 1),) for i in range(case.shape[0])]
    return list(np.ndindex(case.shape if case.layer.kind == "embedding" else case.shape[:-1]))


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_a_batch_is_computed_row_by_row_and_its_gradients_add_up(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    layer, W, b, x, dy, p = case.layer, case.W, case.b, case.x, case.dy, case.params()
    adapters = [Adapter(case.method, p)]
    y, gradients = stack.forward(layer, W, b, adapters, x), stack.vjp(layer, W, b, adapters, x, dy)
    sums = {field: np.zeros(getattr(p, field).shape) for field in case.trained}
    for row in rows(case):
        assert_close(stack.forward(layer, W, b, adapters, np.asarray(x[row])), y[row], f"row {row} of the output")
        alone = stack.vjp(layer, W, b, adapters, np.asarray(x[row]), dy[row])
        if gradients.x is not None:
            assert alone.x is not None
            assert_close(alone.x, gradients.x[row], f"row {row} of the gradient of x")
        for field in sums:
            sums[field] = sums[field] + getattr(alone.params[0], field)
    for field, total in sums.items():
        assert_close(total, getattr(gradients.params[0], field), f"the sum over rows of the gradient of {field}", rounding=1e-11)


def everything(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """Every operation of the stack on `arrays`."""
    layer, W, b, x, dy = case.layer, arrays["W"], arrays["b"], arrays["x"], arrays["dy"]
    adapters = [Adapter(case.method, arrays["params"])]
    gradients = stack.vjp(layer, W, b, adapters, x, dy)
    results: dict[str, Any] = {"y": stack.forward(layer, W, b, adapters, x), "dx": gradients.x}
    results |= {f"d{field}": value for field, value in gradients.params[0]._asdict().items()}
    try:
        W1, b1 = stack.merge(layer, W, b, adapters)
    except NotMergeableError:
        return results
    W2, b2 = stack.unmerge(layer, W1, b1, adapters, W, b)
    g = case.method.weight_vjp(layer, arrays["params"], W, b, W, W1, b1)
    packed = case.method.pack(layer, arrays["params"])
    unpacked = case.method.unpack(layer, packed)
    return results | {"W1": W1, "b1": b1, "W2": W2, "b2": b2, "gW": g.W, "gb": g.b} | packed | unpacked._asdict()


def flat(arrays: dict[str, Any]) -> dict[str, Host]:
    rest: dict[str, Host] = {name: value for name, value in arrays.items() if name != "params" and value is not None}
    return rest | {name: value for name, value in arrays["params"]._asdict().items() if value is not None}


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_no_argument_is_written_into(name: str, kind: str, data: st.DataObject) -> None:
    """Read-only arrays make every write raise; their copies show one that got around that."""
    case = data.draw(cases(name, kind))
    arrays = {"W": case.W, "b": case.b, "x": case.x, "dy": case.dy, "params": case.params()}
    before = {key: value.copy() for key, value in flat(arrays).items()}
    for array in flat(arrays).values():
        array.setflags(write=False)
    everything(case, arrays)
    case.method.init(case.layer, arrays["W"], np.random.default_rng([case.seed, 30]))
    for key, array in flat(arrays).items():
        assert_same_bits(array, before[key], key)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_float32_in_gives_float32_out(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))

    def narrow(value: Any) -> Any:
        return value.astype(np.float32) if value is not None and value.dtype.kind == "f" else value

    params = case.params()
    arrays = {"W": narrow(case.W), "b": narrow(case.b), "x": narrow(case.x), "dy": narrow(case.dy)}
    results = everything(case, arrays | {"params": type(params)(*map(narrow, params))})
    assert results["y"].dtype == np.float32
    wide = {
        key: str(value.dtype) for key, value in results.items() if value is not None and value.dtype not in (np.float32, np.int64, np.int32)
    }
    assert not wide


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_an_object_array_of_floats_gives_the_same_numbers(name: str, kind: str, data: st.DataObject) -> None:
    """Elements that bring their own arithmetic take the same path; a Python float is the plainest of them."""
    case = data.draw(cases(name, kind, few=True))

    def boxed(value: Any) -> Any:
        return Boxed.array(value) if value is not None and value.dtype.kind == "f" else value

    params = case.params()
    arrays = {"W": case.W, "b": case.b, "x": case.x, "dy": case.dy}
    expected = everything(case, arrays | {"params": params})
    got = everything(case, {k: boxed(v) for k, v in arrays.items()} | {"params": type(params)(*map(boxed, params))})
    for key, want in expected.items():
        assert (got[key] is None) == (want is None), key
        if want is not None and want.dtype.kind == "f":
            assert_close(np.vectorize(float, otypes=[float])(got[key]), want, key, rounding=1e-11)


class Boxed:
    """A float that knows only +, -, *, /, the functions that `check.exact` knows, and its order; NumPy's object arrays call these."""

    def __init__(self, value: float) -> None:
        self.value = value

    @staticmethod
    def array(values: Host) -> Host:
        out = np.empty(values.shape, dtype=object)
        out.reshape(-1)[:] = [Boxed(v) for v in values.reshape(-1).tolist()]
        return out

    def __float__(self) -> float:
        return float(self.value)

    def __lt__(self, other: Any) -> bool:
        return self.value < float(other)

    def __gt__(self, other: Any) -> bool:
        return self.value > float(other)

    def __ge__(self, other: Any) -> bool:
        return self.value >= float(other)

    def __le__(self, other: Any) -> bool:
        return self.value <= float(other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Boxed) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]

    def __abs__(self) -> Boxed:
        return Boxed(abs(self.value))

    def __neg__(self) -> Boxed:
        return Boxed(-self.value)

    def __pos__(self) -> Boxed:
        return self

    def exp(self) -> Boxed:
        return Boxed(math.exp(self.value))

    def tanh(self) -> Boxed:
        return Boxed(math.tanh(self.value))

    def cos(self) -> Boxed:
        return Boxed(math.cos(self.value))

    def sin(self) -> Boxed:
        return Boxed(math.sin(self.value))

    def __add__(self, other: Any) -> Boxed:
        return Boxed(self.value + float(other))

    def __sub__(self, other: Any) -> Boxed:
        return Boxed(self.value - float(other))

    def __mul__(self, other: Any) -> Boxed:
        return Boxed(self.value * float(other))

    def __truediv__(self, other: Any) -> Boxed:
        return Boxed(self.value / float(other))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> Boxed:
        return Boxed(float(other) - self.value)

    def __rtruediv__(self, other: Any) -> Boxed:
        return Boxed(float(other) / self.value)

    def sqrt(self) -> Boxed:
        return Boxed(float(self.value) ** 0.5)


def test_a_case_draws_every_array_apart() -> None:
    """The laws compare arrays with one another: two that were equal by chance of the seed would hide a mix-up."""
    from peft_ref.layers import Linear
    from peft_ref.methods import LoRA

    case = Case(LoRA(r=3), Linear(in_features=3, out_features=3), True, (3, 3), 7)
    arrays = [case.W, case.x, case.dy, case.params().A, case.params().B, case.params(21).A, replace(case, seed=8).W]
    for i, one in enumerate(arrays):
        assert not any(np.array_equal(one, other) for other in arrays[i + 1 :])
