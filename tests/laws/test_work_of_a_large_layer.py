"""What a large layer computes, and does not compute twice: counted, as its numbers would be the same.

A forward pass and its gradient are two products with all of a weight, whatever method acts on it; more of them would be what PEFT does.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from peft_ref import dense, large, stack
from peft_ref.contracts import WeightMethod
from peft_ref.layers import Linear
from peft_ref.methods import IA3, OFT, DoRA, LoRA
from peft_ref.stack import Adapter
from tests.laws.test_dense import called_large

LAYER = Linear(in_features=6, out_features=8)
PRODUCTS: dict[str, WeightMethod[Any]] = {
    "LoRA": LoRA(r=2),
    "DoRA": DoRA(r=2),
    "IA3": IA3(),
    "IA3 of inputs": IA3(is_feedforward=True),
    "OFT": OFT(oft_block_size=3, use_cayley_neumann=False),
}


def work(method: WeightMethod[Any], tokens: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel is called by a forward pass with its gradient; a product with all of W as "whole"."""
    rng, calls = np.random.default_rng(tokens), Counter[str]()
    W, x, dy = rng.normal(size=LAYER.shape), rng.normal(size=(tokens, 6)), rng.normal(size=(tokens, 8))
    start = method.init(LAYER, W, rng).params
    params = type(start)(*(None if v is None else v + rng.normal(size=v.shape) / 8 for v in start))

    def counted(name: str) -> Any:
        kernel = getattr(dense, name)

        def call(*given: Any) -> Any:
            matrices = [M.shape for _, M in given[0]] if name == "sum_of_products" else [given[1].shape]
            calls.update([name, *("whole" for shape in matrices if {*shape} == {6, 8})])
            return kernel(*given)

        return call

    for name in ("product", "sum_of_products", "turned", "column_dots"):
        monkeypatch.setattr(dense, name, counted(name))
    with called_large(rows=100):
        _, pull = stack.forward_and_vjp(LAYER, W, None, [Adapter(method, params)], x)
        pull(dy)
    return calls


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("tokens", [7, 9])
def test_a_layer_is_two_products_with_its_weight(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert work(PRODUCTS[name], tokens, monkeypatch)["whole"] == 2


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("tokens", [7, 9])
def test_no_gradient_of_the_whole_weight_is_formed(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "weight_vjp", None)
    assert work(PRODUCTS[name], tokens, monkeypatch)["whole"] == 2


def test_a_rotation_of_a_long_input_turns_the_weight_once_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert work(PRODUCTS["OFT"], 9, monkeypatch)["turned"] == 1


def test_a_scale_reads_its_gradient_from_y(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of a row that is scaled by next to nothing is it computed anew."""
    assert work(PRODUCTS["IA3"], 9, monkeypatch)["column_dots"] == 1


def test_a_part_of_a_layer_has_as_many_outputs_as_rows() -> None:
    assert large.part(LAYER, slice(2, 5)) == Linear(in_features=6, out_features=3)
