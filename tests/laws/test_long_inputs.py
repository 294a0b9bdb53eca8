"""Which of a large matrix and its input is changed, and what a low-rank adapter adds to the gradients beside another method."""

from __future__ import annotations

import numpy as np
import pytest

from peft_ref import stack
from peft_ref.contracts import Factors
from peft_ref.layers import Linear
from peft_ref.methods import METHODS, LoRA
from peft_ref.stack import Adapter, Dropout
from tests.laws.compare import assert_close
from tests.laws.strategies import map_params
from tests.laws.test_dense import ROUNDING, called_large
from tests.laws.test_work_of_a_large_layer import PRODUCTS


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 9])
@pytest.mark.parametrize("share", [False, True])
def test_rotations_turn_the_input_or_the_weight_whichever_has_fewer_rows(tokens: int, share: bool) -> None:
    rng, layer = np.random.default_rng(0), Linear(in_features=6, out_features=8)
    method = METHODS.weights["oft"](r=0, oft_block_size=3, block_share=share, use_cayley_neumann=False)  # type: ignore[call-arg]
    rows = (tokens,) if tokens % 2 else (2, tokens // 2)
    W, x, dy = rng.normal(size=(8, 6)), rng.normal(size=(*rows, 6)), rng.normal(size=(*rows, 8))
    adapters = [Adapter(method, method.to_params(R=rng.normal(size=(1 if share else 2, 3))))]
    plain = stack.forward(layer, W, None, adapters, x), stack.vjp(layer, W, None, adapters, x, dy)
    with called_large():
        assert stack._set_up(layer, W, None, adapters, x).turns_input == (tokens < 8)
        y, pull = stack.forward_and_vjp(layer, W, None, adapters, x)
    assert_close(y, plain[0], "y", rounding=ROUNDING)
    assert_close(pull(dy).x, plain[1].x, "dx", rounding=ROUNDING)
    assert_close(pull(dy).params[0].R, plain[1].params[0].R, "dR", rounding=ROUNDING)


def test_a_block_without_numbers_spoils_no_other() -> None:
    rng, layer = np.random.default_rng(0), Linear(in_features=6, out_features=8)
    method = METHODS.weights["oft"](r=0, oft_block_size=3, use_cayley_neumann=False)  # type: ignore[call-arg]
    W, x, dy, R = rng.normal(size=(8, 6)), rng.normal(size=(9, 6)), rng.normal(size=(9, 8)), rng.normal(size=(2, 3))
    R[0, 1] = np.nan
    adapters = [Adapter(method, method.to_params(R=R))]
    plain = stack.vjp(layer, W, None, adapters, x, dy)
    with called_large():
        large_one = stack.vjp(layer, W, None, adapters, x, dy)
    for got, want, good in ((large_one.x, plain.x, np.s_[:, 3:]), (large_one.params[0].R, plain.params[0].R, np.s_[1:])):
        assert np.array_equal(np.isnan(got), np.isnan(want))
        assert_close(got[good], want[good], "the other block", rounding=ROUNDING)


@pytest.mark.parametrize("tokens", [7, 8])
def test_a_low_rank_adapter_alone_is_added_to_the_weight_of_a_long_input(tokens: int) -> None:
    """And not where it is one of two, or has dropout: then what it adds is no part of one weight's product."""
    rng, layer, method = np.random.default_rng(0), Linear(in_features=6, out_features=8), LoRA(r=2)
    W, x = rng.normal(size=(8, 6)), rng.normal(size=(tokens, 6))
    a = Adapter(method, method.to_params(A=rng.normal(size=(2, 6)), B=rng.normal(size=(8, 2))))
    with called_large():
        assert stack._set_up(layer, W, None, [a], x).sides == [tokens < 8]
        assert stack._set_up(layer, W, None, [a, a], x).sides == [True, True]
        assert stack._set_up(layer, W, None, [a._replace(dropout=Dropout(x > 0, 0.5))], x).sides == [True]


@pytest.mark.parametrize("below", [name for name in PRODUCTS if name != "LoRA"])
@pytest.mark.parametrize("tokens", [7, 9])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_low_rank_adapter_beside_another_has_its_part_of_every_gradient(below: str, tokens: int, dropped: bool) -> None:
    """y = x W'^T + drop(x) (B A)^T, whose gradients are those of the two."""
    rng, layer, lora, method = (
        np.random.default_rng(tokens),
        Linear(in_features=6, out_features=8),
        LoRA(r=2, lora_alpha=6),
        PRODUCTS[below],
    )
    W, b, x, dy = rng.normal(size=(8, 6)), rng.normal(size=8), rng.normal(size=(tokens, 6)), rng.normal(size=(tokens, 8))
    first, second = (Adapter(m, map_params(lambda v: v + rng.normal(size=v.shape), m.init(layer, W, rng).params)) for m in (method, lora))
    B, A, _ = lora.factors(second.params)
    mask = rng.random(x.shape) > 0.3
    kept = mask / 0.7 if dropped else np.ones(x.shape)
    with called_large():
        y, pull = stack.forward_and_vjp(layer, W, b, [first, second._replace(dropout=Dropout(mask, 0.3) if dropped else None)], x)
        d = pull(dy)
    alone = stack.vjp(layer, W, b, [first], x, dy)
    assert_close(y, stack.forward(layer, W, b, [first], x) + (kept * x) @ A.T @ B.T, "y", rounding=ROUNDING)
    assert alone.x is not None
    assert d.x is not None
    assert_close(d.x, alone.x + kept * (dy @ B @ A), "dx", rounding=ROUNDING)
    of_lora = lora.factors_vjp(second.params, Factors(dy.T @ (kept * x) @ A.T, B.T @ dy.T @ (kept * x)))
    for got, want in ((d.params[0], alone.params[0]), (d.params[1], of_lora)):
        for one, other, field in zip(got, want, want._fields, strict=True):
            assert (one is None) == (other is None), field
            if other is not None:
                assert_close(one, other, field, rounding=ROUNDING)
