"""Every function of one number, and its gradient, is transformers': on both sides of its corners, and on them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
activations = pytest.importorskip("transformers.activations")

from peft_ref.activations import FUNCTIONS  # noqa: E402
from peft_ref.arrays import at_least, at_least_vjp  # noqa: E402

pytestmark = pytest.mark.hf

# Every eighth: 0, 3 and 6 are among them. Then next to a corner, and far out.
X = np.concatenate([np.linspace(-9, 9, 145), [1e-9, -1e-9, -1e-7, -2e-6, 10.0, 10.5, 20.0, 20.5, 40.0, -40.0]])


def test_every_function_of_transformers_is_here() -> None:
    assert FUNCTIONS.keys() == activations.ACT2FN.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_slope_are_those_of_transformers(name: str) -> None:
    x = torch.tensor(X, requires_grad=True)
    f = activations.ACT2FN[name]
    y = (f.double() if name == "prelu" else f)(x)  # which takes no other dtype than its own; xielu's is bfloat16
    y.backward(torch.linspace(1, 2, len(X), dtype=torch.float64))
    np.testing.assert_allclose(FUNCTIONS[name].f(X), y.detach().numpy(), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(FUNCTIONS[name].vjp(X, np.linspace(1, 2, len(X))), x.grad.numpy(), rtol=1e-13, atol=1e-14)


def test_what_is_held_at_a_least_value_is_torchs_clamp_at_that_value_too() -> None:
    x = torch.tensor(X, requires_grad=True)
    torch.clamp(x, min=3.0).backward(torch.tensor(2 * X))
    np.testing.assert_array_equal(at_least(X, 3.0), np.maximum(X, 3.0))
    np.testing.assert_array_equal(at_least_vjp(X, 3.0, 2 * X), x.grad.numpy())
    assert x.grad[X == 3.0] > 0
