"""What is drawn as torch draws it: permutations and uniform float32 numbers to the bit, the others to one rounding of the largest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from peft_ref.errors import ConfigError  # noqa: E402
from peft_ref.methods.torch_draws import LARGEST, UNSEEDED, Generator, as_bfloat16, randperm  # noqa: E402

pytestmark = pytest.mark.hf
SEEDS = (0, 1, 42, 2**32 - 1, 2**33 + 5)
EDGES = (0, 1, 777, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1, -1, -5)
DTYPES: dict[str, Any] = {"float32": np.float32, "float64": np.float64}


def both(seed: int) -> tuple[Any, Generator]:
    return torch.Generator().manual_seed(seed), Generator(seed)


def theirs(n: int, seed: int) -> Any:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shapes", [((1,), (3, 5)), ((16,), (15,)), ((7, 13), (100, 9), (2,)), ((4099,), (17,))])
def test_uniform_numbers_one_draw_after_the_other(seed: int, shapes: tuple[tuple[int, ...], ...], dtype: str) -> None:
    generator, ours = both(seed)
    for n, shape in enumerate(shapes):
        low, high = -0.3 * (n + 1), 0.7 / (n + 1)
        want = torch.empty(shape, dtype=getattr(torch, dtype)).uniform_(low, high, generator=generator).numpy()
        got = ours.uniform(shape, low, high, DTYPES[dtype])
        assert got.dtype == DTYPES[dtype]
        atol = 0 if dtype == "float32" else np.spacing(max(abs(low), high))  # torch does not round the product
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_normal_numbers_of_every_size_one_draw_after_the_other(seed: int, dtype: str) -> None:
    """torch approximates in float32, so a number may be off by one rounding of the largest, and of the mean that is added to it."""
    generator, ours = both(seed)
    for shape in [(n,) for n in range(1, 50)] + [(33, 5), (40, 40), (3,), (2,), (1,)]:
        want = torch.empty(shape, dtype=getattr(torch, dtype)).normal_(0.5, 2.0, generator=generator).numpy()
        got = ours.normal(shape, 0.5, 2.0, DTYPES[dtype])
        assert got.dtype == DTYPES[dtype]
        np.testing.assert_allclose(got, want, rtol=0, atol=np.spacing(DTYPES[dtype](8 if dtype == "float32" else 4)))
        assert np.array_equal(ours.normal((4,), 0.0, 1.0), torch.randn(4, generator=generator).numpy())  # in float64, whatever the dtype


def test_every_small_permutation_and_every_edge_of_a_seed() -> None:
    for seed in EDGES:
        for n in range(70):
            assert np.array_equal(Generator(seed).randperm(n), theirs(n, seed)), (n, seed)


def test_permutations_of_random_sizes_and_seeds_and_the_first_of_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        n, seed = int(rng.integers(1, 5000)), int(rng.integers(2**63))
        first = int(rng.integers(n + 1))
        assert np.array_equal(Generator(seed).randperm(n, first), theirs(n, seed)[:first]), (n, seed, first)


@pytest.mark.parametrize("n", [70_001, 2048 * 2048])
def test_the_first_of_many(n: int) -> None:
    assert np.array_equal(Generator(777).randperm(n, 1000), theirs(n, 777)[:1000])


def test_uniform_numbers_of_sixteen_bits_never_reach_their_bound() -> None:
    """Some are rounded up to it, which torch turns into the other one."""
    generator, ours = both(0)
    drawn = torch.empty(100_000, dtype=torch.bfloat16).uniform_(-(3**0.5), 3**0.5, generator=generator).float().numpy()
    assert np.array_equal(ours.uniform_bfloat16((100_000,), -(3**0.5), 3**0.5), drawn)
    assert drawn.max() < 1.734375 == -drawn.min()


def test_permutations_among_other_draws() -> None:
    generator, ours = both(3)
    for n in (5, 1, 2, 100, 16):
        assert np.array_equal(ours.randperm(n), torch.randperm(n, generator=generator).numpy())
        assert np.array_equal(ours.uniform((3,), 0, 1), torch.rand(3, generator=generator).numpy())


def test_an_unseeded_generator_has_the_seed_that_we_say() -> None:
    assert torch.Generator().initial_seed() == UNSEEDED
    assert np.array_equal(Generator().randperm(50), torch.randperm(50, generator=torch.Generator()).numpy())


def test_raw_numbers_are_torchs() -> None:
    drawn = torch.randint(999_983, (1000,), generator=torch.Generator().manual_seed(5)).numpy()
    assert np.array_equal(Generator(5).raw(1000) % 999_983, drawn)


def test_what_torch_shuffles_in_another_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="not reproduced"):
        Generator(0).randperm(LARGEST + 1, 3)


def test_half_of_the_last_of_sixteen_bits_is_rounded_to_the_even_one() -> None:
    """And what is one more or one less than half is not, in torch's own rounding."""
    high = np.arange(0x3F80, 0x4080, dtype=np.uint32) << 16
    bits = np.concat([high + low for low in (0x7FFF, 0x8000, 0x8001, 0, 1, 0xFFFF)]).astype(np.uint32)
    x = bits.view(np.float32)
    assert np.array_equal(as_bfloat16(x), torch.tensor(x).to(torch.bfloat16).float().numpy())


def test_the_last_size_that_is_shuffled_so_is_the_largest_below_a_twentieth_of_the_largest_of_32_bits() -> None:
    """torch asks n < 4294967295 / 20; as many numbers as that are too many to draw here, so it is not asked."""
    assert Generator(1).randperm(214_748_363, first=1).shape == (1,)
    with pytest.raises(ConfigError, match="214748364 numbers"):
        Generator(1).randperm(214_748_364, first=1)


def test_a_remembered_permutation_cannot_be_written_into() -> None:
    with pytest.raises(ValueError, match="read-only"):
        randperm(5, 0)[0] = 3
