"""DeLoRA's lengths at e and below it, where they are held and have no gradient: autograd through PEFT's own delta, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from peft.tuners.delora.layer import DeloraLayer  # noqa: E402

from peft_ref.contracts import Factors  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods import DeLoRA  # noqa: E402
from peft_ref.methods.delora import LEAST  # noqa: E402
from tests.laws.compare import assert_close  # noqa: E402

pytestmark = pytest.mark.hf
LENGTHS = (LEAST, 0.5 * LEAST, 0.0, 2 * LEAST, 1.0)
LAYER = Linear(in_features=6, out_features=7)


def of_lengths(n: int, rng: np.random.Generator) -> Any:
    """Rows of these lengths, each in a direction of its own; that of the length e has one entry, so that nothing rounds."""
    rows = rng.normal(size=(len(LENGTHS), n))
    rows *= np.asarray(LENGTHS)[:, None] / np.linalg.norm(rows, axis=1)[:, None]
    rows[0] = np.eye(n)[1] * LEAST
    assert np.linalg.norm(rows[0]) == torch.tensor(rows).norm(dim=1)[0] == LEAST
    return rows


def parameters(seed: int) -> tuple[DeLoRA, Any]:
    rng = np.random.default_rng(seed)
    method = DeLoRA(r=len(LENGTHS))
    A, B = of_lengths(6, rng), of_lengths(7, rng)[rng.permutation(len(LENGTHS)) if seed else slice(None)].T
    return method, method.to_params(A=A, B=B, length=np.asarray([3.0]), w=1 + rng.random(6))


@pytest.mark.parametrize("seed", range(4))
def test_gradients_at_the_least_length_are_pefts(seed: int) -> None:
    method, p = parameters(seed)
    leaves = {name: torch.tensor(getattr(p, name), requires_grad=True) for name in ("A", "B", "length")}
    delta = DeloraLayer._compute_delta(leaves["A"], leaves["B"], leaves["length"], method.r, torch.tensor(p.w))
    G = np.random.default_rng(9).normal(size=(7, 6))
    delta.backward(torch.tensor(G))
    W = np.zeros((7, 6))
    assert_close(method.weight(LAYER, p, W, None, W)[0], delta.detach().numpy(), "the delta")
    grads = method.weight_vjp(LAYER, p, W, None, W, G, None).params
    for name, leaf in leaves.items():
        theirs = leaf.grad.numpy()
        for row in range(len(LENGTHS)) if name != "length" else [slice(None)]:
            pick = (row,) if name != "B" else (slice(None), row)
            size = float(np.max(np.abs(theirs[pick])))
            assert_close(getattr(grads, name)[pick], theirs[pick], f"d{name} {row}", rounding=1e-12 * size / max(1.0, size))


def test_a_length_that_is_held_says_nothing_of_its_row_or_column() -> None:
    """c_i does not move with a row of A that is shorter than e, nor with such a column of B."""
    method, p = parameters(0)
    held = [n for n, length in enumerate(LENGTHS) if length < LEAST]
    G, H = np.random.default_rng(1).normal(size=(7, 5)), np.zeros((5, 6))
    d = method.factors_vjp(p, Factors(B=G, A=H))
    assert not np.any(d.A[held])
    assert all(np.any(d.A[n]) for n in range(len(LENGTHS)) if n not in held)
    c = 3.0 / method.r / np.maximum(LENGTHS, LEAST) ** 2
    assert_close(d.B[:, held], G[:, held] * c[held], "dB", rounding=1e-15)
