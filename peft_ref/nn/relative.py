"""T5's relative positions: what a head adds to its scores depends on how far the key is from the query, in buckets.

    M[h, t, s] = table[bucket(s - t), h]              dtable[k, h] = sum of dM[h, t, s] over all t, s whose distance is in bucket k

An encoder halves the buckets: those of keys behind the query come first, then those of keys ahead. A decoder, which never looks ahead,
has all of them for the distance back, and puts keys ahead at distance 0. Of n buckets for a distance d >= 0, with m = n // 2:

    d < m        bucket d
    d >= m       bucket m + i where  m (D / m)^(i / (n - m)) <= d,  the largest such i, but at most n - 1       D the maximal distance

Source  Raffel et al. 2020, arXiv:1910.10683, section 2.1; HF's T5Attention, which takes logarithms in float32. For powers of two that could
        land on the wrong side; the tests find no size where it does. Here whole numbers are compared, and nothing is rounded.
"""

from __future__ import annotations

from peft_ref.arrays import Array, namespace
from peft_ref.errors import ConfigError


def edges(n: int, max_distance: int) -> tuple[int, ...]:
    """The least distance of each of the n buckets but the first."""
    m = n // 2
    if m < 1 or max_distance <= m:
        raise ConfigError(
            f"{n} buckets for one direction and a maximal distance of {max_distance}: at least 2 and more than {m} are needed.\n"
            "  relative_attention_num_buckets (an encoder halves it) and relative_attention_max_distance."
        )
    return (*range(1, m), *(_edge(i, m, n - m, max_distance) for i in range(n - m)))


def _edge(i: int, m: int, wide: int, max_distance: int) -> int:
    """The least whole d with d^wide >= D^i m^(wide - i)."""
    power = max_distance**i * m ** (wide - i)
    d = int(m * (max_distance / m) ** (i / wide))
    while d**wide >= power:
        d -= 1
    while d**wide < power:
        d += 1
    return d


def buckets(ahead: Array, n: int, max_distance: int, *, both_ways: bool) -> Array:
    """The bucket of every distance s - t, whole numbers of any shape."""
    xp = namespace(ahead)
    if not both_ways:
        return _bucket(xp.where(ahead < 0, -ahead, 0 * ahead), edges(n, max_distance))
    half = n // 2
    return half * xp.astype(ahead > 0, ahead.dtype) + _bucket(xp.abs(ahead), edges(half, max_distance))


def _bucket(distance: Array, starts: tuple[int, ...]) -> Array:
    """How many of the edges were reached."""
    found = 0 * distance
    for start in starts:
        found = found + namespace(distance).astype(distance >= start, distance.dtype)
    return found
