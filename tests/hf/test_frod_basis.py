"""What FRoD works out of the frozen weights, against PEFT's own functions and its live models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.tuners.frod.layer import FrodLayer  # noqa: E402
from peft.tuners.frod.model import _projection_from_weights  # noqa: E402

from peft_ref.methods.frod_basis import basis, categories, in_basis, places, solved  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


def weights(*sizes: tuple[int, int], dtype: Any = np.float32) -> list[Any]:
    return [np.random.default_rng(i).normal(size=size).astype(dtype) for i, size in enumerate(sizes)]


def pefts(given: list[Any], ridge: float = 1e-3) -> Any:
    return _projection_from_weights([torch.tensor(W) for W in given], ridge).numpy()


# ---- V

WIDE = [((3, 7),), ((6, 7),), ((1, 2),), ((2, 7), (3, 7)), ((2, 9), (3, 9), (1, 9)), ((40, 64),), ((3, 64),)]


@pytest.mark.parametrize("sizes", WIDE, ids=str)
def test_of_fewer_rows_than_inputs_v_is_pefts_to_the_bit_where_the_library_is_torch(sizes: Any) -> None:
    """Those too that the weights have no rows for, and which no formula tells: torch's own choice, that of one decomposition."""
    given = weights(*sizes)
    np.testing.assert_array_equal(basis([torch.tensor(W) for W in given], 1e-3).numpy(), pefts(given))


@pytest.mark.parametrize("sizes", WIDE, ids=str)
def test_of_fewer_rows_than_inputs_numpys_v_spans_what_pefts_does(sizes: Any) -> None:
    """Up to signs the vectors that there are rows for; the others are orthonormal and orthogonal to them."""
    given, rows = weights(*sizes), sum(out for out, _ in sizes)
    ours, theirs = basis(given, 1e-3), pefts(given)
    np.testing.assert_allclose(np.abs(ours[:, :rows]), np.abs(theirs[:, :rows]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.T @ ours, np.eye(len(ours)), rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours[:, rows:] @ ours[:, rows:].T, theirs[:, rows:] @ theirs[:, rows:].T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [((7, 7),), ((9, 7),), ((3, 7), (4, 7)), ((4, 7), (9, 7)), ((8, 7), (2, 7), (5, 7)), ((1, 1),)], ids=str)
def test_of_as_many_rows_as_inputs_or_more_v_is_made_of_the_layers_shares(sizes: Any) -> None:
    """V V^T is R^T R whatever E is. Of several layers the directions are told by them: U in that basis is theirs but for signs."""
    given = weights(*sizes, dtype=np.float64)
    ours, theirs = basis(given, 1e-3), pefts(given)
    scale = float(np.max(np.abs(theirs @ theirs.T)))
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-12 * scale)
    if len(sizes) > 1 and sum(out for out, _ in sizes) > sizes[0][1]:  # else every direction has the same share
        told = [np.linalg.solve(V, given[0].T).T for V in (ours, theirs)]
        np.testing.assert_allclose(*map(np.abs, told), rtol=0, atol=1e-8)


def test_a_thin_library_has_all_vectors_too() -> None:
    da = pytest.importorskip("dask.array")
    (W,) = weights((3, 7), dtype=np.float64)
    V = np.asarray(basis([da.from_array(W, chunks=-1)], 1e-3))
    np.testing.assert_allclose(V.T @ V, np.eye(7), rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.abs(V[:, :3]), np.abs(basis([W], 1e-3)[:, :3]), rtol=0, atol=1e-12)


# ---- U and L


def assert_solved(W: Any, V: Any) -> None:
    U, L = solved(W, V)
    theirs = [found.numpy() for found in FrodLayer._calculate_frod_u_and_lambda(None, torch.tensor(V), torch.tensor(W))]
    np.testing.assert_allclose(U, theirs[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(L, theirs[1], rtol=1e-6, atol=1e-300)


BOUND = 1e-12
SHORT = [np.nextafter(BOUND, 0), BOUND, np.nextafter(BOUND, 1), 0.0]


def test_a_column_that_is_short_is_no_direction_as_in_peft() -> None:
    """Up to the very bound; the next number beyond it is one."""
    for length in SHORT:
        assert_solved(np.asarray([[length, 3.0], [0.0, -4.0]]), np.eye(2))
    assert_solved(np.asarray([SHORT]), np.eye(4))
    assert float(solved(np.asarray([[BOUND]]), np.eye(1))[0][0, 0]) == 0
    assert float(solved(np.asarray([[-np.nextafter(BOUND, 1)]]), np.eye(1))[0][0, 0]) == -1


SINGULAR = np.diag([4.0, 4e-5, 2e-6, 4e-7, 0.0])


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_basis_without_an_inverse_has_pefts_pseudo_inverse(seed: int | None) -> None:
    """Singular values below a millionth of the largest are left out, and no others. On torch it is torch's own error that tells."""
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(5, 5)))[0] if seed is not None else np.eye(5)
    (W,) = weights((3, 5), dtype=np.float64)
    V = Q @ SINGULAR
    kept = np.diag([0.25, 1 / 4e-5, 0.0, 0.0, 0.0])
    want = W @ Q @ kept
    for send in (np.asarray, torch.tensor):
        np.testing.assert_allclose(np.asarray(in_basis(send(W), send(V))), want, rtol=1e-9, atol=1e-9 * np.max(np.abs(want)))
    if seed is None:  # else what is left out is zero but for rounding, which is long enough for a direction
        assert_solved(W, V)


# ---- which layers, and where


class Named(torch.nn.Module):
    def __init__(self, **sizes: tuple[int, int]) -> None:
        super().__init__()
        for name, (n_in, out) in sizes.items():
            at = self
            *above, last = name.split("_")
            for part in above:
                if not hasattr(at, part):
                    at.add_module(part, torch.nn.Module())
                at = getattr(at, part)
            at.add_module(last, torch.nn.Linear(n_in, out))


def model(sizes: dict[str, tuple[int, int]], **options: Any) -> Any:
    torch.manual_seed(0)
    targets = [name.split("_")[-1] for name in sizes]
    config = peft.FrodConfig(**{"target_modules": targets, "progressbar": False, **options})
    return peft.get_peft_model(Named(**sizes), config)


def test_of_modules_without_a_block_every_weight_is_read() -> None:
    """Each counts as a block of its own, by its place among all that are adapted."""
    sizes = {"a_up": (5, 3), "a_mlp_q": (5, 9), "b_mlp_q": (5, 4), "0_mlp_q": (5, 6)}
    live = model(sizes)
    names = [name.replace("_", ".") for name in sizes]
    frozen = {name: live.base_model.model.get_submodule(name).base_layer.weight.detach().numpy() for name in names}
    found = categories(names)
    assert {category: list(own.modules) for category, own in found.items()} == {"a_up": names[:1], "mlp_q": names[1:]}
    for category, own in found.items():
        V, theirs = basis([frozen[name] for name in own.read], 1e-3), live.base_model.frod_V[category]["default"].numpy()
        np.testing.assert_allclose(V @ V.T, theirs @ theirs.T, rtol=0, atol=1e-5 * np.max(np.abs(theirs @ theirs.T)))


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 0.87, 1.0])
def test_places_are_pefts_where_a_category_has_none_or_all_of_them(rate: float) -> None:
    """A layer of one input has no entry beside its diagonal. Drawn are then those of the categories after it."""
    sizes = {"a": (1, 3), "b": (3, 3), "c": (8, 2), "d": (2, 2), "e": (5, 2)}
    live = model(sizes, sparse_rate=rate, projection_prng_key=3).base_model
    theirs = {category: held["default"].numpy() for category, held in live.frod_s_indices.items()}
    drawn = places({name: n for name, (n, _) in sizes.items()}, {name: held.shape[1] for name, held in theirs.items()}, 3)
    assert drawn.keys() == theirs.keys()
    for category, at in drawn.items():
        assert at.dtype == theirs[category].dtype == np.int64
        np.testing.assert_array_equal(at, theirs[category])
