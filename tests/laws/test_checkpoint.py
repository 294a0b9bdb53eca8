"""Parameters survive the trip to their checkpoint keys, and a wrong file is refused by the name of what is wrong."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_ref.contracts import WeightMethod, declared
from peft_ref.errors import KeyMismatchError, PeftRefError, ShapeError
from peft_ref.files.infer import infer_layer
from tests.laws.compare import assert_same_bits
from tests.laws.strategies import LAW, PAIRS, Case, Host, cases


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
    letters = next(declared(case.method.params_type)[s.field][0] for s in case.method.spec(case.layer) if s.key == wrong)
    for part in (f"{wrong} is {shape}", f"expected {packed[wrong].shape} ({letters})", "'block.0'"):
        assert part in first


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_the_layer_that_tensors_tell_has_those_tensors(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    packed = case.method.pack(case.layer, case.params())
    method, keys = alone(case.method), beside(case)
    assume(keys and not getattr(method, "proportional_parameters", False))  # then all layers say together how many numbers one has
    told = infer_layer(method, {key: packed[key] for key in keys}, "block.0")
    assert {s.key: s.stored_shape for s in method.spec(told) if s.key in keys} == {key: packed[key].shape for key in keys}


def alone(method: WeightMethod[Any]) -> WeightMethod[Any]:
    """As a configuration says it, without what the other layers tell."""
    told = {f.name: f.default for f in fields(method) if f.name.startswith("widest_")}  # type: ignore[arg-type]  # every method is a dataclass
    return replace(method, **told)  # type: ignore[type-var]


def beside(case: Case) -> list[str]:
    """The keys that a file holds beside every layer."""
    return [s.key for s in case.method.spec(case.layer) if s.saved and not s.shared]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_tensors_that_no_layer_has_are_told_from_others(name: str, kind: str, data: st.DataObject) -> None:
    """Either none is told, or one that has other tensors; and whatever was wrong, it is said in our own words."""
    case = data.draw(cases(name, kind))
    packed = {key: tensor for key, tensor in case.method.pack(case.layer, case.params()).items() if key in beside(case)}
    assume(packed)
    one = data.draw(st.sampled_from(sorted(packed)))
    stranger, deep = packed | {"stranger": np.zeros(3)}, packed | {one: packed[one][(None,) * 6]}
    method, wrong = alone(case.method), data.draw(st.sampled_from(({}, stranger, _renamed(packed, one), deep)))
    try:
        told = infer_layer(method, wrong, "block.0")
    except PeftRefError:
        return
    with pytest.raises(PeftRefError):
        method.unpack(told, wrong, "block.0", own=True)


def _renamed(packed: dict[str, Host], one: str) -> dict[str, Host]:
    return {f"{key}_" if key == one else key: tensor for key, tensor in packed.items()}
