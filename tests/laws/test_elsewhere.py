"""What is computed stays where its arguments are: in their library and on their device, in their dtype, with NumPy's numbers.

array-api-strict has devices that are one in name only, and it refuses to mix them with each other and with NumPy. On NumPy alone a zero
made in another library, or on the device that is nobody's, would not show.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws.strategies import LAW_ON_BACKEND, PAIRS, cases
from tests.laws.test_on_backends import ROUNDINGS, UNIT, arguments, results
from tests.methods import facts


@pytest.fixture(scope="module")
def strict() -> ModuleType:
    return pytest.importorskip("array_api_strict")


def there(value: Any, strict: ModuleType) -> Any:
    """An array on a device that is not the default, the floating point ones in the dtype that is not the default either."""
    dtype = strict.float32 if value.dtype.kind == "f" else None
    return strict.asarray(value, dtype=dtype, device=strict.Device("device1"))


def back(value: Any, strict: ModuleType) -> Any:
    assert isinstance(value, strict.asarray(0).__class__), type(value)
    assert value.device == strict.Device("device1")
    assert value.dtype == strict.float32 or strict.isdtype(value.dtype, "integral"), value.dtype
    return np.asarray(strict.asarray(value, device=strict.Device("CPU_DEVICE")))


def assert_near(got: Any, want: Any, what: str) -> None:
    allowed = ROUNDINGS * UNIT["float32"] * max(1.0, float(np.max(np.abs(want), initial=0.0)))
    np.testing.assert_allclose(got, want, rtol=0, atol=allowed, err_msg=what)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@settings(LAW_ON_BACKEND, max_examples=1)
def test_all_that_is_computed_is_where_its_arguments_are(strict: ModuleType, name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, few=True))
    sent = {what: there(value, strict) for what, value in arguments(case).items()}
    expected = results(case, {what: back(value, strict) for what, value in sent.items()})
    got = results(case, sent)
    assert got.keys() == expected.keys()
    for what, want in expected.items():
        assert_near(back(got[what], strict), want, what)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@settings(LAW_ON_BACKEND, max_examples=2)
def test_a_start_is_where_the_weight_is(strict: ModuleType, name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, fresh=True, few=True))
    W = there(case.W, strict)
    start, expected = (case.method.init(case.layer, V, np.random.default_rng(7)) for V in (W, back(W, strict)))
    assert_near(back(start.W, strict), expected.W, "W")
    found, wanted = ({what: value for what, value in s.params._asdict().items() if value is not None} for s in (start, expected))
    assert found.keys() == wanted.keys()
    found = {what: back(value, strict) for what, value in found.items()}
    if getattr(case.method, "init_lora_weights", True) in ("pissa", "olora"):  # singular vectors have no sign of their own
        return
    if (free := facts(name).without_signs) is not None:
        found, wanted = dict(free(found)), dict(free(wanted))
    for what, want in wanted.items():
        assert_near(found[what], want, what)
