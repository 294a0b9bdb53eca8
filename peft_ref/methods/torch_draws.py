"""What torch draws on the CPU from a seeded generator, without torch: the same bits.

    uniform     the low 24 bits of each raw number, u = n / 2^24, then u (high - low) + low, a fused multiply-add:
                one rounding, to float32
    randperm    for i = 0, 1, ...: swap entry i with entry i + raw mod (n - i). Entry i is final after step i, so the first k of n
                cost k steps. From 2^32 / 20 numbers on torch shuffles in another way

Raw numbers are the Mersenne Twister's, started from the seed's low 32 bits. Measured against torch in tests/hf/test_torch_draws.py.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from peft_ref.errors import ConfigError

Host: TypeAlias = np.ndarray[Any, Any]

UNSEEDED = 67280421310721  # the seed of a torch.Generator() that nobody seeded
LARGEST = (2**32 - 1) // 20 - 1


class Generator:
    """torch.Generator().manual_seed(seed): every draw goes on where the last one ended."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self._bits._legacy_seeding(seed & 0xFFFFFFFF)  # as RandomState(seed), which has no raw bits

    def raw(self, count: int) -> Host:
        """The next `count` draws of 32 bits."""
        return np.asarray(self._bits.random_raw(count), dtype=np.int64)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> Host:
        """torch.empty(shape).uniform_(low, high, generator=self), float32."""
        first, last = np.float32(low), np.float32(high)
        u = (self.raw(math.prod(shape)) & 0xFFFFFF) * 2.0**-24
        # 24 bits times 24 bits is exact in float64, so that only the sum is rounded, to float32
        return (u * float(last - first) + float(first)).astype(np.float32).reshape(shape)


@lru_cache(maxsize=32)
def randperm(n: int, seed: int, first: int | None = None) -> Host:
    """torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:first]. Do not write into it."""
    if n > LARGEST:
        raise ConfigError(f"torch shuffles {n} numbers in a way that is not reproduced here.\n  Up to {LARGEST} there is another.")
    k = n if first is None else min(first, n)
    swaps = Generator(seed).raw(min(k, n - 1)) if n > 1 else np.zeros(0, dtype=np.int64)
    moved: dict[int, int] = {}  # entries that are no longer where they began
    out = np.empty(k, dtype=np.int64)
    for i in range(k):
        j = i + int(swaps[i]) % (n - i) if i < n - 1 else i
        out[i], moved[j] = moved.get(j, j), moved.get(i, i)
    out.flags.writeable = False
    return out
