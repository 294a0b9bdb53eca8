"""torch's generator on the CPU, where a method's places in the weight come from it: the same bits, without torch.

    Generator().manual_seed(seed)   the Mersenne Twister started from the lower 32 bits of the seed
    randperm(n)                     for i = 0, 1, ...: swap entry i with entry i + raw mod (n - i), raw the next 32 random bits

Entry i is final after step i, so the first k of n entries cost k steps. From 2^32 / 20 numbers on torch shuffles in another way.
Measured against torch bit for bit, over many seeds and sizes, in tests/hf/test_torch_random.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from peft_ref.errors import ConfigError

UNSEEDED = 67280421310721  # the seed of a torch.Generator() that nobody seeded
LARGEST = (2**32 - 1) // 20 - 1


def raw(seed: int, count: int) -> np.ndarray[Any, Any]:
    """The first `count` draws of 32 bits."""
    bits = np.random.MT19937()
    bits._legacy_seeding(seed & 0xFFFFFFFF)  # as RandomState(seed), which has no raw bits
    return np.asarray(bits.random_raw(count), dtype=np.int64)


@lru_cache(maxsize=32)
def randperm(n: int, seed: int, first: int | None = None) -> np.ndarray[Any, Any]:
    """torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:first]. Do not write into it."""
    if n > LARGEST:
        raise ConfigError(f"torch shuffles {n} numbers in a way that is not reproduced here.\n  Up to {LARGEST} there is another.")
    k = n if first is None else min(first, n)
    swaps = raw(seed, min(k, n - 1)) if n > 1 else np.zeros(0, dtype=np.int64)
    moved: dict[int, int] = {}  # entries that are no longer where they began
    out = np.empty(k, dtype=np.int64)
    for i in range(k):
        j = i + int(swaps[i]) % (n - i) if i < n - 1 else i
        out[i], moved[j] = moved.get(j, j), moved.get(i, i)
    out.flags.writeable = False
    return out
