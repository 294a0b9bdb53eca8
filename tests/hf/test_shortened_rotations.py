"""PSOFT's turn out of a Neumann series, and its gradient, are PEFT's: where Q is too long and is shortened, at the very bound, below it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.contracts import Factors  # noqa: E402
from peft_ref.methods import PSOFT  # noqa: E402
from tests.laws.compare import assert_close, assert_same_bits  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
TIE = np.asarray([0.25, 0.0, -0.25, 0.0, 0.0, 0.0])  # |Q| is a half
WORDS: list[dict[str, Any]] = [
    {"use_cayley_neumann": series, "cayley_neumann_eps": eps, "num_cayley_neumann_terms": terms}
    for series, eps, terms in ((True, 0.5, 5), (True, 0.9, 5), (True, 0.25, 2), (True, 0.5, 3), (True, None, 6), (False, 0.5, 5))
]


def module(q: Any, **words: Any) -> Any:
    """PEFT's own module of R, in float64."""
    base = torch.nn.Sequential()
    base.add_module("l", torch.nn.Linear(6, 5))
    made = peft.get_peft_model(base, peft.PsoftConfig(target_modules=["l"], r=4, psoft_mag_a=False, psoft_mag_b=False, **words))
    turn = made.base_model.model.l.psoft_R["default"].double()
    with torch.no_grad():
        turn.weight.copy_(torch.tensor(q))
    return turn


@pytest.mark.parametrize("words", WORDS, ids=str)
@pytest.mark.parametrize("length", [0.3, 1.0, 1.0 + 2**-40, 1.0 - 2**-40, 1.9, 7.0, 1e-9, 0.0])
def test_the_turn_and_its_gradient_are_pefts(length: float, words: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    for q in (TIE * length, rng.normal(size=6) / 5 * length):
        turn, dR = module(q, **words), rng.normal(size=(4, 4))
        R = turn.get_matrix()
        (R * torch.tensor(dR)).sum().backward()
        method = PSOFT(r=4, psoft_alpha=4, psoft_mag_a=False, psoft_mag_b=False, **words)
        p = method.to_params(q=q, A=np.eye(4), B=np.eye(4))  # B (R - I) A is R - I
        assert_close(method.factors(p).B + np.eye(4), R.detach().numpy(), "R", rounding=1e-13)
        got = method.factors_vjp(p, Factors(B=dR, A=np.zeros((4, 4)))).q
        assert_close(got, turn.weight.grad.numpy(), "dq", rounding=1e-12)


@pytest.mark.parametrize("eps", [0.5, 0.9])
def test_what_is_not_longer_than_the_bound_stays_to_the_bit(eps: float) -> None:
    free, bound = (PSOFT(r=4, use_cayley_neumann=True, cayley_neumann_eps=limit) for limit in (None, eps))
    p = free.to_params(q=TIE, v_a=np.ones(4), v_b=np.ones(4), A=np.eye(4), B=np.eye(4))
    d = Factors(B=np.random.default_rng(0).normal(size=(4, 4)), A=np.zeros((4, 4)))
    assert_same_bits(bound.factors(p).B, free.factors(p).B, "R - I")
    assert_same_bits(bound.factors_vjp(p, d).q, free.factors_vjp(p, d).q, "dq")
