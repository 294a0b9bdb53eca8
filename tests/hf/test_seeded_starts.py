"""What is made of a seed of the configuration is PEFT's to the bit: RandLoRA's bases, dense and sparse, and SHiRA's places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref.layers import Layer, Linear  # noqa: E402
from peft_ref.methods import RandLoRA, SHiRA  # noqa: E402
from peft_ref.methods.randlora import bases  # noqa: E402
from peft_ref.methods.torch_draws import Generator  # noqa: E402
from tests.laws.compare import assert_same_bits  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
SIZES = [((6, 5),), ((3, 7),), ((4, 9), (9, 2), (5, 6)), ((64, 48),)]  # (out, in) of every layer
SPARSE = [{}, {"sparse": True}, {"very_sparse": True}, {"sparse": True, "very_sparse": True}]


def theirs(sizes: Any, **options: Any) -> dict[str, Any]:
    base = torch.nn.ModuleDict({f"l{i}": torch.nn.Linear(n_in, out) for i, (out, n_in) in enumerate(sizes)})
    made = peft.get_peft_model(base, peft.RandLoraConfig(**options, target_modules=[*base])).base_model
    return {letter: getattr(made, f"randlora_{letter}")["default"].float().numpy() for letter in "AB"}


def ours(sizes: Any, **options: Any) -> dict[str, Any]:
    layers: dict[str, Layer] = {f"l{i}": Linear(in_features=n_in, out_features=out) for i, (out, n_in) in enumerate(sizes)}
    weights = {name: np.zeros(layer.shape) for name, layer in layers.items()}  # in float64, which holds whatever comes
    bases.cache_clear()  # of other draws
    made = RandLoRA(**options).common(layers, weights, np.random.default_rng(0))
    assert all(p.A is made["l0"].A and p.B is made["l0"].B for p in made.values())
    return {letter: getattr(made["l0"], letter) for letter in "AB"}


@pytest.mark.parametrize("options", SPARSE, ids=lambda options: "-".join(options) or "dense")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bases_are_pefts(sizes: Any, options: dict[str, bool]) -> None:
    for r, seed in ((3, 0), (1, 1), (2, 7), (5, 2)):
        said = {**options, "r": r, "projection_prng_key": seed}
        expected = theirs(sizes, **said)
        for letter, got in ours(sizes, **said).items():
            np.testing.assert_array_equal(got, expected[letter], err_msg=f"{letter} of {said}")


def test_a_number_at_the_bound_has_no_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Very sparse bases of four inputs have signs below 1/4 and above 3/4, and these two come out of no generator soon."""

    def eighths(shape: tuple[int, ...]) -> Any:
        return (np.arange(np.prod(shape)) % 8 / 8).reshape(shape).astype(np.float32)

    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.tensor(eighths(shape)))
    monkeypatch.setattr(Generator, "uniform", lambda self, shape, low, high: eighths(shape))
    expected = theirs(((9, 4),), r=3, very_sparse=True)
    assert 0 < (expected["B"] == 0).mean() < 1
    for letter, got in ours(((9, 4),), r=3, very_sparse=True).items():
        np.testing.assert_array_equal(got, expected[letter], err_msg=letter)
    bases.cache_clear()


@pytest.mark.parametrize("seed", [None, 0, 9])
@pytest.mark.parametrize("size", [(2, 2), (5, 3), (3, 7)], ids=str)
def test_places_are_pefts_in_its_thirty_two_bits(size: tuple[int, int], seed: int | None) -> None:
    base = torch.nn.ModuleDict({"l": torch.nn.Linear(size[1], size[0])})
    made = peft.get_peft_model(base, peft.ShiraConfig(r=1, random_seed=seed, target_modules=["l"])).base_model.model["l"]
    start = SHiRA(r=1, random_seed=seed).init(Linear(in_features=size[1], out_features=size[0]), np.zeros(size), np.random.default_rng(0))
    assert_same_bits(start.params.indices, made.shira_indices["default"].numpy(), "places")
