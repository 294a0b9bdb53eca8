"""OFT's blocks, its series and its bound, as PEFT has them."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft.tuners.oft.layer import OFTLayer, OFTRotationModule  # noqa: E402

from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods.cayley import neumann, neumann_vjp, skew, skew_vjp  # noqa: E402
from peft_ref.methods.oft import OFT, Params  # noqa: E402

pytestmark = pytest.mark.hf
RNG = np.random.default_rng(0)


def test_a_block_size_that_does_not_divide_the_layer_becomes_pefts_divisor() -> None:
    for n in range(1, 31):
        layer = Linear(in_features=n, out_features=2)
        for wanted in range(1, n + 3):
            size = OFTLayer.adjust_oft_parameters(None, n, wanted)
            assert OFT(oft_block_size=wanted).blocks(layer) == (n // size, size)
            assert OFT(oft_block_size=0, r=wanted).blocks(layer) == (size, n // size)


@pytest.mark.parametrize("terms", range(9))
@pytest.mark.parametrize("b", [2, 3, 4])
def test_the_series_of_any_number_of_terms_and_its_gradient_are_pefts(terms: int, b: int) -> None:
    numbers, G = RNG.normal(size=(2, b * (b - 1) // 2)), RNG.normal(size=(2, b, b))
    module = OFTRotationModule(2, numbers.shape[1], b, 2 * b)
    given = torch.tensor(numbers, requires_grad=True)
    R = module._cayley_batch(given, b, True, terms)
    Q = skew(numbers, b)
    np.testing.assert_allclose(neumann(Q, terms), R.detach().numpy(), rtol=0, atol=1e-12 * max(1, float(R.detach().abs().max())))
    ours = skew_vjp(neumann_vjp(Q, terms, G))
    if terms <= 1:
        assert not np.any(ours)
        return
    (R * torch.tensor(G)).sum().backward()
    np.testing.assert_allclose(ours, given.grad.numpy(), rtol=0, atol=1e-12 * max(1, float(given.grad.abs().max())))


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("b", [1, 2, 3])
def test_coft_bounds_every_block_as_peft_does(rows: int, b: int) -> None:
    """By eps over the root of the number of rows: some of the blocks are within it, and stay."""
    numbers = np.linspace(0.1, 1.0, rows)[:, None] * RNG.normal(size=(rows, b * (b - 1) // 2))
    module = OFTRotationModule(rows, numbers.shape[1], b, rows * b, coft=True, eps=0.9)
    projected = module._project_batch(torch.tensor(numbers), eps=0.9).numpy()
    method = OFT(oft_block_size=b, coft=True, eps=0.9)
    np.testing.assert_allclose(method.acting(Params(numbers)).R, projected, rtol=0, atol=1e-7)  # its root is of float32
