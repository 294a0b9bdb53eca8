"""Gradients are linear in what they are given: where nobody asks after the bias, its gradient counts as zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws.compare import assert_close
from tests.laws.strategies import LAW, PAIRS, cases


def numbers(params: Any) -> dict[str, Any]:
    return {field: value for field, value in params._asdict().items() if value is not None}


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] != "embedding"])
@given(data=st.data())
@settings(LAW, max_examples=3)
def test_no_gradient_of_a_bias_is_one_of_zero(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, few=True).filter(lambda c: c.bias and c.layer.groups == 1))
    p, b, dW = case.params(), case.b, case.numbers(4, case.layer.shape)
    assert b is not None
    none, zero = (case.method.weight_vjp(case.layer, p, case.W, b, case.W, dW, db) for db in (None, np.zeros_like(b)))
    assert_close(none.W, zero.W, "dW")
    found, wanted = numbers(none.params), numbers(zero.params)
    assert all(np.all(wanted[field] == 0) for field in wanted.keys() - found.keys())
    for field, value in found.items():
        assert_close(value, wanted[field], f"d{field}")
