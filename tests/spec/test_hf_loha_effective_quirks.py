"""The quirks in spec/methods/loha_effective.md, each against HF PEFT run live."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

from peft_ref.contracts import Delta  # noqa: E402
from peft_ref.layers import Conv  # noqa: E402
from peft_ref.methods.loha_effective import LoHaEffective, Params  # noqa: E402
from tests.spec.hf_made import keys, model, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
LAYER = Conv(in_channels=3, out_channels=5, kernel_size=(2, 3))
OURS = LoHaEffective(r=2, alpha=3)


def loha(**more: Any) -> Any:
    return peft.LoHaConfig(target_modules=["l"], **{"r": 2, "alpha": 3, "use_effective_conv2d": True, **more})


def drawn(seed: int) -> tuple[Any, Params, Any, dict[str, Any]]:
    """PEFT's model, our parameters of the same numbers, a gradient of the delta, and PEFT's gradients for it."""
    rng = np.random.default_rng(seed)
    layer = wrapped(made := model(nn.Conv2d(3, 5, (2, 3)), loha()))
    named = {name: getattr(layer, name)["a0"] for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")}
    for p in named.values():
        p.data = torch.tensor(rng.normal(size=tuple(p.shape)))
    G = rng.normal(size=LAYER.weight_shape)
    layer.get_delta_weight("a0").backward(torch.tensor(G))
    tensors = {name: p.detach().numpy() for name, p in named.items()}
    return made, OURS.unpack(LAYER, tensors), LAYER.fold(G), {name: p.grad.numpy() for name, p in named.items()}


def test_lohaeffective_q1_two_gradients_are_not_the_derivative() -> None:
    _, p, G, theirs = drawn(1)
    ours, true = OURS.delta_vjp(LAYER, p, Delta(G)), OURS.delta_vjp_true(LAYER, p, Delta(G))
    for name, gradient in theirs.items():
        field = name.removeprefix("hada_")
        got, right = getattr(ours, field), getattr(true, field)
        np.testing.assert_allclose(got.reshape(-1), gradient.reshape(-1), rtol=1e-12, atol=1e-12)
        assert np.allclose(got, right) == (field not in ("w1_a", "w2_a")), field
        step = 1e-6 * np.random.default_rng(2).normal(size=right.shape)
        above, below = (OURS.delta(LAYER, p._replace(**{field: getattr(p, field) + s * step})).W for s in (1, -1))
        assert np.sum(right * step) == pytest.approx(np.sum(G * (above - below)) / 2, rel=1e-6)


def test_lohaeffective_q1_and_may_point_uphill() -> None:
    along = []
    for seed in range(20):
        _, p, G, theirs = drawn(seed)
        true = OURS.delta_vjp_true(LAYER, p, Delta(G))
        along.append(np.sum(theirs["hada_w1_a"] * true.w1_a))
    assert min(along) < 0 < max(along)


def test_lohaeffective_q2_without_a_core_the_tensors_are_plain_loha() -> None:
    plain = {"hada_w1_a": (5, 2), "hada_w1_b": (2, 3), "hada_w2_a": (5, 2), "hada_w2_b": (2, 3)}
    for layer in (nn.Linear(3, 5), nn.Conv1d(3, 5, 1), nn.Conv2d(3, 5, 1)):
        assert keys(model(layer, loha())) == keys(model(layer, loha(use_effective_conv2d=False))) == plain
    assert keys(model(nn.Conv2d(3, 5, (1, 2)), loha()))["hada_w1_a"] == (2, 5)


def test_lohaeffective_q3_a_1d_kernel_is_stored_as_a_2d_one() -> None:
    assert keys(model(nn.Conv1d(3, 5, 4), loha())) == keys(model(nn.Conv2d(3, 5, (4, 1)), loha()))
    assert keys(model(nn.Conv1d(3, 5, 4), loha()))["hada_t1"] == (2, 2, 4, 1)
