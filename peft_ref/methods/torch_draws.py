"""What torch draws on the CPU from a seeded generator, without torch: the same bits.

    uniform     the low 24 bits of each raw number, u = n / 2^24, then u (high - low) + low, a fused multiply-add:
                one rounding, to float32

Raw numbers are the Mersenne Twister's, started from the seed's low 32 bits. Measured against torch in tests/hf/test_torch_draws.py.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

Host: TypeAlias = np.ndarray[Any, Any]


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
