"""The quirks of the methods that turn a weight, seen in HF PEFT run live."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import HRAConfig, RoadConfig  # noqa: E402
from torch import nn  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(layer: Any, config: Any) -> Any:
    base = nn.Sequential()
    base.add_module("l", layer)
    return peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()


def wrapped(made: Any) -> Any:
    return made.base_model.model.l


def moved(layer: Any, config: Any, x: Any) -> float:
    """How far a fresh adapter is from changing nothing."""
    before = layer(x)
    return float((model(layer, config)(x) - before).abs().max())


def hra(**more: Any) -> Any:
    return HRAConfig(target_modules=["l"], **{"r": 4, **more})


def test_hra_q1_an_odd_number_is_no_identity() -> None:
    x = torch.randn(2, 6)
    assert moved(nn.Linear(6, 5), hra(r=4), x) < 1e-12
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert moved(nn.Linear(6, 5), hra(r=3), x) > 0.1
    assert any("r is odd" in str(w.message) for w in caught)


def test_hra_q2_gram_and_schmidt_divide_by_a_rounding_error() -> None:
    x = torch.randn(2, 6)
    assert not moved(nn.Linear(6, 5), hra(apply_GS=True), x) < 0.1  # far away, or no number
    made = model(nn.Linear(6, 5), hra(apply_GS=True, init_weights=False))
    R = wrapped(made).get_delta_weight("default")
    assert torch.allclose(R @ R, torch.eye(6), atol=1e-9)


@pytest.mark.parametrize("geometry", [{"dilation": 2}, {"stride": (1, 2)}, {"padding": (0, 2)}])
def test_hra_q3_a_convolutions_forward_is_not_its_merged_layer(geometry: dict[str, Any]) -> None:
    made = model(nn.Conv2d(3, 5, 2, **geometry), hra())
    x = torch.randn(2, 3, 7, 6)
    y = made(x)
    made.merge_adapter()
    assert y.shape != made(x).shape


def test_hra_q4_a_kernel_that_is_not_square_raises() -> None:
    made = model(nn.Conv2d(3, 5, (2, 3)), hra())
    with pytest.raises(RuntimeError):
        made(torch.randn(2, 3, 7, 6))


def test_hra_q5_a_zero_column_is_no_number() -> None:
    made = model(nn.Linear(6, 5), hra())
    wrapped(made).hra_u["default"].data[:, 1] = 0.0
    assert made(torch.randn(2, 6)).isnan().all()


def road(**more: Any) -> Any:
    return RoadConfig(target_modules=["l"], **{"group_size": 4, "init_weights": False, **more})


def test_road_q1_unmerging_inverts_in_float32() -> None:
    made = model(nn.Linear(6, 8), road())
    before = wrapped(made).base_layer.weight.detach().clone()
    made.merge_adapter()
    made.unmerge_adapter()
    off = (wrapped(made).base_layer.weight - before).abs().max().item()
    assert 1e-10 < off < 1e-4


@pytest.mark.parametrize(("g", "partner"), [(2, 1), (4, 2), (8, 4)])
def test_road_q2_partners_are_half_a_group_apart(g: int, partner: int) -> None:
    linear = nn.Linear(6, 8, bias=False)
    linear.weight.data = torch.zeros(8, 6)
    linear.weight.data[0] = 1.0
    y = model(linear, road(group_size=g))(torch.ones(6))
    assert y.nonzero().reshape(-1).tolist() == [0, partner]
