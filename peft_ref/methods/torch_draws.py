"""What torch draws on the CPU from a seeded generator, without torch.

    uniform   float32: the low 24 bits of a raw number, u = n / 2^24, then u (high - low) + low, a fused multiply-add: one rounding.
              float64: 53 bits of two raw numbers, the first of them the upper half, n / 2^53, then the same, here in two roundings.
    normal    Box and Muller: sqrt(-2 log(1 - u)) times the cosine and the sine of 2 pi v.
              16 numbers and more are made of as many uniform ones, 16 at a time: of u_1 .. u_8, v_1 .. v_8 first the cosines, then the
              sines. What is left over is covered by one more such 16, which ends with the last number.
              Fewer are made one pair at a time in float64, v drawn first. A sine not yet given away waits for the next such draw.
    randperm  for i = 0, 1, ...: swap entry i with entry i + raw mod (n - i). Entry i is final after step i, so the first k cost k steps.
              From 2^32 / 20 entries on torch shuffles in another way.

Raw numbers are the Mersenne Twister's, started from the seed's low 32 bits. Measured against torch in tests/hf/test_torch_draws.py:
uniform float32 numbers and permutations to the bit, the others to a rounding of the largest number, as torch approximates logarithms.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from peft_ref.errors import ConfigError

Host: TypeAlias = np.ndarray[Any, Any]
Float: TypeAlias = type[np.float32] | type[np.float64]

UNSEEDED = 67280421310721  # the seed of a torch.Generator() that nobody seeded
LARGEST = 214_748_363  # below (2^32 - 1) / 20, rounded down


class Generator:
    """torch.Generator().manual_seed(seed): every draw goes on where the last one ended."""

    def __init__(self, seed: int = UNSEEDED) -> None:
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)  # as RandomState(seed), which has no raw bits
        self._sine: float | None = None

    def raw(self, count: int) -> Host:
        """The next `count` draws of 32 bits."""
        return np.asarray(self._bits.random_raw(count))

    def uniform(self, shape: tuple[int, ...], low: float, high: float, dtype: Float = np.float32) -> Host:
        """torch.empty(shape, dtype=dtype).uniform_(low, high, generator=self)."""
        first, last = dtype(low), dtype(high)
        # 24 bits times 24 bits is exact in float64, so that only the sum is rounded, to float32
        numbers = self._unit(math.prod(shape), dtype).astype(np.float64) * float(last - first) + float(first)
        return numbers.astype(dtype).reshape(shape)

    def normal(self, shape: tuple[int, ...], mean: float, std: float, dtype: Float = np.float32) -> Host:
        """torch.empty(shape, dtype=dtype).normal_(mean, std, generator=self); of 0 and 1 torch.randn."""
        n = math.prod(shape)
        if n < 16:
            return (np.asarray([self._one() for _ in range(n)]) * std + mean).astype(dtype).reshape(shape)
        given, whole = self._unit(n, dtype), n - n % 16
        numbers = _box_muller(given[:whole].reshape(whole // 16, 2, 8))
        if whole < n:  # the last 16 are drawn anew
            numbers = np.concat([numbers[: n - 16], _box_muller(self._unit(16, dtype).reshape(1, 2, 8))])
        return (numbers * std + mean).astype(dtype).reshape(shape)

    def uniform_bfloat16(self, shape: tuple[int, ...], low: float, high: float) -> Host:
        """The same in torch.bfloat16: drawn in float32 and rounded; what is rounded up to `high` is `low`."""
        rounded = as_bfloat16(self.uniform(shape, low, high))
        return np.where(rounded >= as_bfloat16(high), as_bfloat16(low), rounded)

    def randperm(self, n: int, first: int | None = None) -> Host:
        """torch.randperm(n, generator=self)[:first]. After it, nothing more can be drawn in step with torch where `first` was given."""
        if n > LARGEST:
            raise ConfigError(f"torch shuffles {n} numbers in a way that is not reproduced here.\n  Up to {LARGEST} there is another.")
        k = n if first is None else min(first, n)
        swaps = self.raw(max(min(k, n - 1), 0))
        moved: dict[int, int] = {}  # entries that are no longer where they began
        out = np.empty(k, dtype=np.int64)
        for i in range(k):
            j = i + int(swaps[i]) % (n - i) if i < n - 1 else i
            out[i], moved[j] = moved.get(j, j), moved.get(i, i)
        return out

    def _unit(self, n: int, dtype: Float) -> Host:
        """n numbers of [0, 1)."""
        if dtype is np.float32:
            return ((self.raw(n) & 0xFFFFFF) * 2.0**-24).astype(np.float32)
        upper, lower = self.raw(2 * n).reshape(n, 2).T
        return np.asarray(((upper << 32 | lower) & (2**53 - 1)) * 2.0**-53)

    def _one(self) -> float:
        """One normal number: the sine that is left of the last pair, or the cosine of a new one."""
        if self._sine is not None:
            sine, self._sine = self._sine, None
            return sine
        v, u = self._unit(2, np.float64)
        radius = math.sqrt(-2.0 * math.log1p(-u))
        self._sine = radius * math.sin(2.0 * math.pi * v)
        return radius * math.cos(2.0 * math.pi * v)


@lru_cache(maxsize=32)
def randperm(n: int, seed: int, first: int | None = None) -> Host:
    """The first draw of a fresh generator, remembered. Do not write into it."""
    places = Generator(seed).randperm(n, first)
    places.setflags(write=False)
    return places


def _box_muller(pairs: Host) -> Host:
    """Normal numbers of blocks (n, 2, 8) of u and v, flat; in steps of their dtype, as in torch."""
    u, v = 1 - pairs[:, 0], pairs[:, 1]
    radius, angle = np.sqrt(-2 * np.log(u)), v * v.dtype.type(2 * math.pi)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def as_bfloat16(x: Any) -> Host:
    """Numbers rounded to bfloat16, as float32: to nearest, to even."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
