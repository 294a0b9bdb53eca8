"""Parameters survive the trip to their checkpoint keys, and a wrong file is refused by the name of what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_ref.errors import KeyMismatchError, ShapeError
from tests.laws.compare import assert_same_bits
from tests.laws.strategies import LAW, PAIRS, cases


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_unpack_undoes_pack(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    p = case.params()
    packed = case.method.pack(case.layer, p)
    assert {key: tensor.shape for key, tensor in packed.items()} == {s.key: s.stored_shape for s in case.method.spec(case.layer)}
    back = case.method.unpack(case.layer, packed)
    assert type(back) is type(p)
    for field in p._fields:
        before, after = getattr(p, field), getattr(back, field)
        assert (before is None) == (after is None), field
        if before is not None:
            assert_same_bits(after, before, field)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_a_missing_tensor_is_named(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    packed = case.method.pack(case.layer, case.params())
    gone = data.draw(st.sampled_from(sorted(packed)))
    with pytest.raises(KeyMismatchError) as caught:
        case.method.unpack(case.layer, {key: tensor for key, tensor in packed.items() if key != gone}, "block.0")
    first = str(caught.value).splitlines()[0]
    assert f"{gone} missing" in first
    assert "'block.0'" in first


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_an_extra_tensor_is_named(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    packed = case.method.pack(case.layer, case.params())
    with pytest.raises(KeyMismatchError) as caught:
        case.method.unpack(case.layer, {**packed, "stranger.weight": np.zeros(3)}, "block.0")
    first = str(caught.value).splitlines()[0]
    assert "unexpected stranger.weight" in first
    assert "'block.0'" in first


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_a_tensor_of_a_wrong_shape_is_named_with_both_shapes(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    packed = case.method.pack(case.layer, case.params())
    wrong = data.draw(st.sampled_from(sorted(packed)))
    shape = (*packed[wrong].shape[:-1], packed[wrong].shape[-1] + 1)
    with pytest.raises(ShapeError) as caught:
        case.method.unpack(case.layer, {**packed, wrong: np.zeros(shape)}, "block.0")
    first = str(caught.value).splitlines()[0]
    for part in (f"{wrong} is {shape}", f"expected {packed[wrong].shape}", "'block.0'"):
        assert part in first
