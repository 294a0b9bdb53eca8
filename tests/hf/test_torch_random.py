"""torch's random permutation, to the bit, over seeds and sizes."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from peft_ref.errors import ConfigError  # noqa: E402
from peft_ref.methods.torch_draws import LARGEST, UNSEEDED, Generator, randperm  # noqa: E402

pytestmark = pytest.mark.hf
EDGES = (0, 1, 777, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1, -1, -5)


def theirs(n: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    found: np.ndarray[tuple[int], np.dtype[np.int64]] = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    return found


def test_every_small_size_and_every_edge_of_a_seed() -> None:
    for seed in EDGES:
        for n in range(70):
            assert np.array_equal(randperm(n, seed), theirs(n, seed)), (n, seed)


def test_random_sizes_and_seeds_and_the_first_of_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        n, seed = int(rng.integers(1, 5000)), int(rng.integers(2**63))
        first = int(rng.integers(n + 1))
        assert np.array_equal(randperm(n, seed, first), theirs(n, seed)[:first]), (n, seed, first)


@pytest.mark.parametrize("n", [70_001, 2048 * 2048])
def test_the_first_of_many(n: int) -> None:
    assert np.array_equal(randperm(n, 777, 1000), theirs(n, 777)[:1000])


def test_an_unseeded_generator_has_the_seed_that_we_say() -> None:
    assert torch.Generator().initial_seed() == UNSEEDED
    assert np.array_equal(randperm(50, UNSEEDED), torch.randperm(50, generator=torch.Generator()).numpy())


def test_raw_numbers_are_torchs() -> None:
    drawn = torch.randint(999_983, (1000,), generator=torch.Generator().manual_seed(5)).numpy()
    assert np.array_equal(Generator(5).raw(1000) % 999_983, drawn)


def test_what_torch_shuffles_in_another_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="not reproduced"):
        randperm(LARGEST + 1, 0, 3)
