"""Any static change of a weight as a LoRA: lossless where nothing is asked, and else the best there is of its rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_ref import stack
from peft_ref.backend import Backend
from peft_ref.contracts import KINDS, LowRank
from peft_ref.errors import ConfigError, PeftRefError
from peft_ref.layers import CONV_KINDS, Conv, Linear
from peft_ref.methods import DoRA, LoRA
from peft_ref.methods.to_lora import NEEDS, to_lora
from peft_ref.stack import Adapter
from tests.laws.strategies import LAW, LAW_ON_BACKEND, PAIRS, Case, Host, cases

PLAIN = [(name, kind) for name, kind in PAIRS if kind in KINDS - CONV_KINDS]


def effect(case: Case, method: Any, params: Any) -> Host:
    """What an adapter adds to the layer's output."""
    y = stack.forward(case.layer, case.W, case.b, [Adapter(method, params)], case.x)
    result: Host = y - stack.forward(case.layer, case.W, case.b, [], case.x)
    return result


def delta_of(case: Case, method: Any, params: Any) -> Host:
    b = np.zeros(case.layer.shape[0]) if case.b is None else case.b
    result: Host = stack.merge(case.layer, case.W, b, [Adapter(method, params)])[0] - case.W
    return result


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] in KINDS])
@given(data=st.data())
@LAW
def test_with_no_rank_asked_nothing_is_lost(name: str, kind: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, kind))
    params = case.params()
    as_lora = to_lora(case.method, case.layer, params, case.W, case.b)
    assert as_lora.lost < 1e-20
    assert as_lora.method.scale == 1
    as_lora.method.unpack(case.layer, as_lora.method.pack(case.layer, as_lora.params))  # in the shapes of a LoRA on this layer
    expected = effect(case, case.method, params)
    size = max(1.0, float(np.max(np.abs(case.W), initial=0.0)))
    np.testing.assert_allclose(effect(case, as_lora.method, as_lora.params), expected, rtol=1e-9, atol=1e-9 * size)


@pytest.mark.parametrize(("name", "kind"), PLAIN)
@given(data=st.data())
@LAW
def test_no_matrix_of_that_rank_is_nearer(name: str, kind: str, data: st.DataObject) -> None:
    """Eckart and Young: what is left is the tail of the singular values; so for the whole of any rank, and for any other factors."""
    case = data.draw(cases(name, kind))
    params = case.params()
    delta = delta_of(case, case.method, params)
    S = np.linalg.svd(delta, compute_uv=False)
    rank = data.draw(st.integers(1, len(S)))
    as_lora = to_lora(case.method, case.layer, params, case.W, case.b, rank=rank)
    assert as_lora.method.r <= rank
    left = float(np.linalg.norm(delta - as_lora.params.B @ as_lora.params.A))
    tail, total = float(np.sqrt(np.sum(S[rank:] ** 2))), float(np.linalg.norm(S))
    np.testing.assert_allclose(left, tail, rtol=1e-7, atol=1e-9 * max(1.0, total))
    np.testing.assert_allclose(as_lora.lost * total**2, tail**2, rtol=1e-7, atol=1e-12 * max(1.0, total**2))
    other = case.numbers(7, (delta.shape[0], rank)) @ case.numbers(8, (rank, delta.shape[1]))
    assert left <= np.linalg.norm(delta - other) + 1e-9


@pytest.mark.parametrize(("name", "kind"), PLAIN)
@given(data=st.data(), energy=st.floats(0.05, 0.999))
@LAW
def test_an_energy_takes_the_smallest_rank_that_has_it(name: str, kind: str, data: st.DataObject, energy: float) -> None:
    case = data.draw(cases(name, kind))
    params = case.params()
    as_lora = to_lora(case.method, case.layer, params, case.W, case.b, energy=energy)
    share = np.cumsum(np.linalg.svd(delta_of(case, case.method, params), compute_uv=False) ** 2)
    if share[-1] < 1e-12:
        assert as_lora.lost <= 1
        return
    k = as_lora.method.r
    assert share[k - 1] / share[-1] >= energy - 1e-9
    assert k == 1 or share[k - 2] / share[-1] < energy + 1e-9


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("method", [LoRA(r=6, lora_alpha=4), DoRA(r=6)], ids=["factors", "a weight"])
def test_a_grouped_convolution_is_converted_group_by_group(groups: int, method: Any) -> None:
    layer = Conv(in_channels=6, out_channels=12, kernel_size=(2, 1), groups=groups)
    if not isinstance(method, LowRank) and groups > 1:
        pytest.skip("its delta does not fit the frozen weight either")
    case = Case(method, layer, False, (2, 6, 3, 3), 5)
    params = case.params()
    previous = np.inf
    for rank in (groups, 2 * groups, 12):
        as_lora = to_lora(method, layer, params, case.W, rank=rank)
        off = float(np.linalg.norm(effect(case, as_lora.method, as_lora.params) - effect(case, method, params)))
        assert off < previous or off == 0
        previous = off
    assert previous < 1e-9
    if groups > 1:
        with pytest.raises(ConfigError, match="divisible"):
            to_lora(method, layer, params, case.W, rank=groups + 1)


def test_an_additive_delta_on_a_grouped_convolution_keeps_to_its_group() -> None:
    from peft_ref.methods import LoHa

    layer = Conv(in_channels=4, out_channels=6, kernel_size=(2,), groups=2)
    case = Case(LoHa(r=2), layer, True, (2, 4, 5), 3)
    try:
        params = case.params()
        expected = effect(case, case.method, params)
    except PeftRefError:
        pytest.skip("LoHa takes no groups")
    as_lora = to_lora(case.method, layer, params, case.W, case.b)
    np.testing.assert_allclose(effect(case, as_lora.method, as_lora.params), expected, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_asked_is_refused_before_anything_is_computed() -> None:
    layer, W = Linear(in_features=3, out_features=2), np.ones((2, 3))
    params = LoRA(r=1).init(layer, W, np.random.default_rng(0)).params
    for asked in ({"rank": 0}, {"rank": True}, {"energy": 0.0}, {"energy": 1.5}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(ConfigError, match=r"rank=|energy="):
            to_lora(LoRA(r=1), layer, params, W, **asked)


@pytest.mark.parametrize(("name", "kind"), PLAIN)
@given(data=st.data())
@LAW_ON_BACKEND
def test_a_backend_loses_no_more_than_numpy(backend: Backend, name: str, kind: str, data: st.DataObject) -> None:
    if not backend.extensions >= NEEDS:
        pytest.skip(f"{backend.name} has no linalg")
    case = data.draw(cases(name, kind, few=True))
    dtype = backend.dtypes[0]
    expected = delta_of(case, case.method, case.params())
    S = np.linalg.svd(expected, compute_uv=False)
    host = {f: v for f, v in case.params()._asdict().items() if v is not None}
    tolerance = 1e3 * (2.0**-53 if dtype == "float64" else 2.0**-24) * max(1.0, float(S[0]))
    for rank, left in ((None, 0.0), (2, float(np.sqrt(np.sum(S[2:] ** 2))))):
        with backend.scope():
            sent = {f: backend.from_numpy(v, dtype) for f, v in host.items()}
            W, b = backend.from_numpy(case.W, dtype), None if case.b is None else backend.from_numpy(case.b, dtype)
            try:
                got = to_lora(case.method, case.layer, case.method.to_params(**sent), W, b, rank=rank)
            except NotImplementedError:
                pytest.skip(f"{backend.name} takes the SVD of matrices that are chunked one way only")
            B, A = backend.to_numpy(got.params.B, dtype), backend.to_numpy(got.params.A, dtype)
        assert abs(float(np.linalg.norm(expected - B @ A)) - left) <= tolerance
