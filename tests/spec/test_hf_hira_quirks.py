"""HiRA's quirks in spec/methods/hira.md, each against HF PEFT run live."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

from tests.spec.hf_made import disagreement, keys, model, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


def hira(**more: Any) -> Any:
    return peft.HiraConfig(target_modules=["l"], **{"r": 2, **more})


def fresh(layer: Any, **more: Any) -> Any:
    base = nn.Sequential()
    base.add_module("l", layer)
    return wrapped(peft.get_peft_model(base, hira(**more), adapter_name="a0"))


def test_hira_q1_unmerge_puts_a_saved_copy_back() -> None:
    made = model(nn.Linear(3, 4), hira())
    before = wrapped(made).base_layer.weight.detach().clone()
    made.merge_adapter()
    wrapped(made).base_layer.weight.data += 1.0
    made.unmerge_adapter()
    assert torch.equal(wrapped(made).base_layer.weight, before)


def test_hira_q2_init_none_is_false_but_on_an_embedding() -> None:
    assert bool(fresh(nn.Linear(3, 4), init_weights=None).hira_B["a0"].any())
    assert bool(fresh(nn.Conv1d(3, 4, 2), init_weights=None).hira_B["a0"].any())
    assert not bool(fresh(nn.Embedding(3, 4), init_weights=None).hira_embedding_A["a0"].any())
    assert bool(fresh(nn.Embedding(3, 4), init_weights=False).hira_embedding_A["a0"].any())


def test_hira_q3_rank_pattern_is_read_for_the_second_adapter_only() -> None:
    patterned = hira(rank_pattern={"l": 3})
    made = model(nn.Linear(3, 4), patterned, patterned)
    assert keys(made, "a0") == {"hira_A": (2, 3), "hira_B": (4, 2)}
    assert keys(made, "a1") == {"hira_A": (3, 3), "hira_B": (4, 3)}


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 1, 2)])
def test_hira_q4_a_kernel_of_ones_in_three_dimensions_raises(kernel: tuple[int, int, int]) -> None:
    x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    with pytest.raises((RuntimeError, IndexError)):
        model(nn.Conv3d(3, 4, kernel), hira())(x)
    assert disagreement(model(nn.Conv3d(3, 4, (1, 2, 2)), hira()), x) < 1e-11


def test_hira_q5_gaussian_is_for_linear_layers_and_only_they_refuse_another_text() -> None:
    torch.manual_seed(1)
    bound = 1 / (50 * 4) ** 0.5
    assert float(fresh(nn.Conv1d(50, 4, 4), init_weights="gaussian").hira_A["a0"].abs().max()) <= bound
    assert float(fresh(nn.Linear(200, 4), init_weights="gaussian").hira_A["a0"].abs().max()) > bound
    assert not bool(fresh(nn.Embedding(3, 4), init_weights="gaussian").hira_embedding_A["a0"].any())
    fresh(nn.Conv1d(3, 4, 2), init_weights="magic")
    with pytest.raises(ValueError, match="magic"):
        fresh(nn.Linear(3, 4), init_weights="magic")


def test_hira_q6_padding_mode_is_not_followed() -> None:
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    assert disagreement(model(nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), hira()), x) > 1
    assert disagreement(model(nn.Conv2d(3, 5, 3, padding=1), hira()), x) < 1e-11
