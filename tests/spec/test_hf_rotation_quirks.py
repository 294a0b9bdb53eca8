"""The quirks of the methods that turn a weight, seen in HF PEFT run live."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft import HRAConfig, OFTConfig, RoadConfig  # noqa: E402
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


def oft(**more: Any) -> Any:
    return OFTConfig(target_modules=["l"], **{"oft_block_size": 3, "init_weights": False, **more})


def oft_model(layer: Any, *configs: Any) -> Any:
    made = model(layer, configs[0])
    for n, config in enumerate(configs[1:]):
        made.add_adapter(f"more{n}", config, autocast_adapter_dtype=False)
    made.base_model.set_adapter(["default", *(f"more{n}" for n in range(len(configs) - 1))])
    return made.eval()


def matrix(made: Any, adapter: str = "default") -> Any:
    return wrapped(made).get_delta_weight(adapter).detach()


def test_oft_q1_the_two_forms_turn_opposite_ways() -> None:
    series, solved = model(nn.Linear(6, 5), oft(num_cayley_neumann_terms=30)), model(nn.Linear(6, 5), oft(use_cayley_neumann=False))
    wrapped(solved).oft_R["default"].weight.data = wrapped(series).oft_R["default"].weight.data.clone()
    assert torch.allclose(matrix(series), matrix(solved).T, atol=1e-8)
    assert (matrix(series) - matrix(solved)).abs().max() > 0.1


def test_oft_q2_three_terms_are_four() -> None:
    made = [model(nn.Linear(6, 5), oft(num_cayley_neumann_terms=n)) for n in (3, 4, 5)]
    for other in made[1:]:
        wrapped(other).oft_R["default"].weight.data = wrapped(made[0]).oft_R["default"].weight.data.clone()
    assert torch.equal(matrix(made[0]), matrix(made[1]))
    assert not torch.equal(matrix(made[1]), matrix(made[2]))


def test_oft_q3_two_adapters_merge_in_another_order_than_they_act() -> None:
    made, x = oft_model(nn.Linear(6, 5, bias=False), oft(), oft(oft_block_size=2)), torch.randn(2, 6)
    W, M1, M2 = wrapped(made).base_layer.weight.detach().clone(), matrix(made), matrix(made, "more0")
    assert torch.allclose(made(x), x @ (W @ M2.T @ M1.T).T)
    made.merge_adapter()
    assert torch.allclose(wrapped(made).base_layer.weight, W @ M1.T @ M2.T)


def test_oft_q4_module_dropout_does_nothing() -> None:
    made, x = model(nn.Linear(6, 5), oft(module_dropout=0.9)), torch.randn(2, 6)
    assert torch.equal(made.train()(x), made.eval()(x))
    assert type(wrapped(made).oft_dropout["default"]).__name__ == "MultiplicativeDropoutLayer"


def test_oft_q5_a_larger_kernel_is_no_identity_and_not_its_merged_layer() -> None:
    conv, x = nn.Conv2d(3, 5, 2), torch.randn(2, 3, 7, 6)
    assert moved(conv, oft(init_weights=True), x) > 0.1
    made = model(nn.Conv2d(3, 5, 2), oft())
    y = made(x)
    made.merge_adapter()
    assert (made(x) - y).abs().max() > 0.1


def test_oft_q6_coft_overwrites_the_stored_numbers() -> None:
    made = model(nn.Linear(6, 5), oft(coft=True, eps=0.1))
    own = wrapped(made).oft_R["default"]
    own.weight.data[:] = 1.0
    x = torch.randn(2, 6)
    torch.set_default_dtype(torch.float32)  # as it is outside of these tests
    made(x)
    norm = (2 * (own.weight**2).sum(dim=1)).sqrt()
    e = (torch.tensor(0.1, dtype=torch.float32) / torch.tensor(2.0, dtype=torch.float32).sqrt()).double()
    assert torch.allclose(norm, e.expand(2), rtol=1e-6)
    assert (norm - 0.1 / 2**0.5).abs().max() > 1e-12


def test_oft_q7_unmerging_inverts_in_float32() -> None:
    made = model(nn.Linear(6, 5), oft())
    before = wrapped(made).base_layer.weight.detach().clone()
    made.merge_adapter()
    made.unmerge_adapter()
    assert 1e-10 < (wrapped(made).base_layer.weight - before).abs().max().item() < 1e-4


def test_oft_q8_four_dimensions_are_taken_for_an_image() -> None:
    made = model(nn.Linear(6, 5), oft())
    assert made(torch.randn(2, 3, 6)).shape == (2, 3, 5)
    with pytest.raises(RuntimeError):
        made(torch.randn(2, 2, 3, 6))
