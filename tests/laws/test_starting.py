"""A fresh adapter: it has the declared shapes, and it changes nothing where it promises to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_ref import stack
from peft_ref.contracts import EVERY_KIND
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Linear
from peft_ref.methods import METHODS, LoRA
from peft_ref.stack import Adapter
from tests.laws.compare import assert_close, assert_same_bits
from tests.laws.strategies import LAW, PAIRS, STRANGERS, Case, Host, cases, layers
from tests.methods import made

# Methods whose default start is not the identity in HF PEFT either.
NOT_THE_IDENTITY: frozenset[str] = frozenset({"kasa", "unilora", "vblora"})  # the first cuts the frozen weight


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[0] not in NOT_THE_IDENTITY])
@given(data=st.data())
@LAW
def test_a_fresh_adapter_changes_nothing(name: str, kind: str, data: st.DataObject) -> None:
    """Where the start changes the frozen weight (pissa, olora), the weight it returns takes the old one's place."""
    case = data.draw(cases(name, kind, fresh=True))
    start = case.start()
    got = stack.forward(case.layer, start.W, case.b, [Adapter(case.method, start.params)], case.x)
    assert_close(got, case.layer.apply(case.x, case.W, case.b), "the output", rounding=1e-11)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_a_fresh_adapter_has_the_declared_shapes_and_the_dtype_of_the_weight(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, fresh=True))
    W = case.W.astype(np.float32)
    start = case.method.init(case.layer, W, np.random.default_rng([case.seed, 30]))
    declared = {s.field: s.shape for s in case.method.spec(case.layer)}
    got = {field: value.shape for field, value in zip(start.params._fields, start.params, strict=True) if value is not None}
    assert got == declared
    assert start.W.shape == W.shape
    for array in (start.W, *(value for value in start.params if value is not None and value.dtype.kind == "f")):
        assert array.dtype == np.float32


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@given(data=st.data())
@LAW
def test_the_same_generator_gives_the_same_start(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind, fresh=True))
    one, other = (case.method.init(case.layer, case.W, np.random.default_rng([case.seed, 30])) for _ in range(2))
    for field in one.params._fields:
        if getattr(one.params, field) is not None:
            assert_same_bits(getattr(other.params, field), getattr(one.params, field), field)


@pytest.mark.parametrize(("name", "kind"), STRANGERS)
@given(data=st.data())
@LAW
def test_a_kind_of_layer_that_is_not_supported_is_refused_by_name(name: str, kind: str, data: st.DataObject) -> None:
    layer = data.draw(layers(kind))
    with pytest.raises(UnsupportedLayerError, match=f"at 'block.0': a {kind} layer"):
        made(name).check_layer(layer, "block.0")


def test_every_method_supports_a_kind_of_layer_and_no_unknown_one() -> None:
    for name, cls in METHODS.weights.items():
        assert cls.kinds, name
        assert cls.kinds <= EVERY_KIND, name


# What the starts of LoRA promise beyond changing nothing


def start_of(data: st.DataObject, init: str) -> tuple[Case, float, Host, Host, Host]:
    """The case, the scale, the factors B and A and the frozen weight of a fresh LoRA on a linear layer."""
    size = st.integers(2, 6)
    layer = Linear(in_features=data.draw(size), out_features=data.draw(size), transposed=data.draw(st.booleans()))
    r, alpha = data.draw(st.sampled_from((2, 1) if init != "orthogonal" else (2, 4))), data.draw(st.sampled_from((2, 1, 3.5)))
    case = Case(LoRA(r=r, lora_alpha=alpha, init_lora_weights=init), layer, False, (3, layer.in_features), data.draw(st.integers(0, 2**20)))
    start = case.method.init(layer, case.W, np.random.default_rng([case.seed, 30]))
    return case, alpha / r, start.params.B, start.params.A, start.W


@given(data=st.data())
@LAW
def test_pissa_takes_out_the_best_approximation_of_its_rank(data: st.DataObject) -> None:
    """Eckart and Young: what is left has the singular values after the first r, and both factors share the root of those taken."""
    case, scale, B, A, left = start_of(data, "pissa")
    r = A.shape[0]
    values = np.linalg.svd(case.W, compute_uv=False)
    rest = np.concatenate([values[r:], np.zeros(r)])
    assert_close(np.linalg.svd(left, compute_uv=False), rest, "the singular values of what is left", rounding=1e-10)
    for factor in (B.T @ B, A @ A.T):
        assert_close(factor, np.diag(values[:r] / scale), "a factor's products", rounding=1e-10)


@given(data=st.data())
@LAW
def test_olora_starts_with_orthonormal_columns_and_what_they_see_of_the_weight(data: st.DataObject) -> None:
    case, _, B, A, _ = start_of(data, "olora")
    assert_close(B.T @ B, np.eye(A.shape[0]), "B^T B")
    assert_close(A, B.T @ case.W, "A")


@given(data=st.data())
@LAW
def test_orthogonal_starts_with_two_factors_that_cancel_though_neither_is_zero(data: st.DataObject) -> None:
    case, _, B, A, left = start_of(data, "orthogonal")
    assert_close(B @ A, np.zeros(case.W.shape), "B A", rounding=1e-14)
    assert np.linalg.norm(A) > 1e-3
    assert np.linalg.norm(B) > 1e-3
    assert_same_bits(left, case.W, "the frozen weight")
