"""A stack with the noise of a training: what MonteCLoRA's and PVeRA's own functions say, behind a dropout, and its derivative."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref import dense
from peft_ref.errors import ConfigError
from peft_ref.layers import Linear
from peft_ref.methods import LoRA, MonteCLoRA, PVeRA
from peft_ref.methods.monteclora import Noise
from peft_ref.stack import Adapter, Drawn, Dropout, forward, forward_and_vjp, vjp
from tests.laws.compare import assert_close

RNG = np.random.default_rng(0)
LARGE = (1100, 1000)


def stacked(kind: str, size: tuple[int, int], *, dropped: bool) -> tuple[Linear, Any, Any, list[Adapter], Any]:
    """A layer with that adapter, and a LoRA above it."""
    (out, n_in), layer = size, Linear(in_features=size[1], out_features=size[0])
    method: Any = (
        PVeRA(r=2) if kind == "pvera" else MonteCLoRA(r=2, lora_alpha=3, monteclora_config={"num_samples": 3, "sample_scaler": 0.5})
    )  # type: ignore[arg-type]
    W, b, x = RNG.normal(size=size), RNG.normal(size=out), RNG.normal(size=(3, 4, n_in))
    params = method.start(layer, W, RNG, method.common({"q": layer}, {"q": W}, RNG).get("q")).params
    params = type(params)(*(None if p is None else p + 0.3 * RNG.normal(size=p.shape) for p in params))
    if kind == "pvera":
        noise: Any = RNG.normal(size=(3, 4, 2))
    else:
        noise = Noise(RNG.normal(size=(3, n_in, 2)), np.diag([2.0, 0.7]), RNG.normal(size=3))
    dropout = Dropout(RNG.random(x.shape) < 0.6, 0.4) if dropped else None
    lora = LoRA(r=2)
    above = Adapter(lora, lora.to_params(A=RNG.normal(size=(2, n_in)), B=RNG.normal(size=(out, 2))))
    return layer, W, b, [Adapter(method, params, Drawn(noise, dropout)), above], x


CASES = [(kind, size, dropped) for kind in ("pvera", "monteclora") for size in ((5, 6), LARGE) for dropped in (False, True)]


@pytest.mark.parametrize(("kind", "size", "dropped"), CASES)
def test_noise_acts_as_the_method_says_on_what_dropout_leaves(kind: str, size: tuple[int, int], dropped: bool) -> None:
    layer, W, b, (a, above), x = stacked(kind, size, dropped=dropped)
    assert isinstance(a.dropout, Drawn)
    assert dense.is_large(W, b, x) == (size == LARGE)
    method: Any = a.method
    seen = x if a.dropout.input is None else x * a.dropout.input.mask / 0.6
    if kind == "pvera":
        alone = method.sampled(layer, a.params, seen, a.dropout.noise)
    else:
        alone = seen @ method.delta(layer, method.noisy(a.params, a.dropout.noise)).W.T
    y = forward(layer, W, b, [a, above], x)
    assert_close(y, forward(layer, W, b, [above], x) + alone, "y", rounding=1e-11)
    assert_close(forward_and_vjp(layer, W, b, [a, above], x)[0], y, "y again", rounding=1e-11)
    without = forward(layer, W, b, [a._replace(dropout=a.dropout.input), above], x)
    assert np.max(np.abs(y - without)) > 1e-3


@pytest.mark.parametrize(("kind", "size", "dropped"), CASES)
def test_the_gradients_under_noise_are_the_derivative(kind: str, size: tuple[int, int], dropped: bool) -> None:
    layer, W, b, (a, above), x = stacked(kind, size, dropped=dropped)
    dy = RNG.normal(size=(3, 4, size[0]))
    got = vjp(layer, W, b, [a, above], x, dy)
    trained = [f for f, d in zip(a.params._fields, got.params[0], strict=True) if d is not None]
    assert trained == (["b", "d"] if kind == "pvera" else ["A", "B", "sigma", "p"])
    ways = {f: RNG.normal(size=getattr(a.params, f).shape) for f in trained}
    dx, dA = RNG.normal(size=x.shape), RNG.normal(size=above.params.A.shape)

    def at(t: float) -> Any:
        moved = a._replace(params=a.params._replace(**{f: getattr(a.params, f) + t * way for f, way in ways.items()}))
        other = above._replace(params=above.params._replace(A=above.params.A + t * dA))
        return forward(layer, W, b, [moved, other], x + t * dx)

    h = 1e-4
    slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    along = sum(np.sum(getattr(got.params[0], f) * way) for f, way in ways.items())
    along += np.sum(got.x * dx) + np.sum(got.params[1].A * dA)
    assert_close(along, np.sum(slope * dy), "the slope", rounding=1e-7)


def test_noise_for_a_method_that_takes_none_is_refused() -> None:
    layer, W, b, (a, above), x = stacked("pvera", (5, 6), dropped=False)
    with pytest.raises(ConfigError, match=r"adapter 1 \(LoRA\) is given noise, and takes none"):
        forward(layer, W, b, [a, above._replace(dropout=a.dropout)], x)
