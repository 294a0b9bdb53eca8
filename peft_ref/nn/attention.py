"""What a transformer's attention (peft_ref/attention.py) is given: rotary positions, a cache of keys and values, the masks that HF builds.

A masked place gets the dtype's lowest finite number, as in HF. Where a whole row is masked, the query of a padding token, it so becomes a
uniform average over all places, and not NaN.

Keys and values put in front (`KeyValue`) are a cache of earlier tokens or a prefix that is trained: it is all one to the mathematics.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from peft_ref.arrays import Array, device, namespace, pad, to
from peft_ref.attention import AttentionGradients as AttentionGradients
from peft_ref.attention import attention as attention
from peft_ref.attention import attention_vjp as attention_vjp
from peft_ref.attention import join_heads as join_heads
from peft_ref.attention import split_heads as split_heads
from peft_ref.errors import ShapeError


def rotate(x: Array, positions: Array, frequencies: tuple[float, ...]) -> Array:
    """Rotary positions: the pair (x_i, x_{i + d/2}) turned by the angle position * frequency_i.   Su et al. 2021, arXiv:2104.09864

    x (batch, heads, T, d), positions (batch or 1, T), d / 2 frequencies. The paper pairs neighbours; HF pairs the two halves.
    """
    xp = namespace(x)
    angles = xp.expand_dims(xp.astype(positions, x.dtype), axis=-1) * to(np.asarray(frequencies), x)
    angles = xp.expand_dims(angles, axis=1)
    cos, sin = xp.cos(angles), xp.sin(angles)
    half = len(frequencies)
    first, second = x[..., :half], x[..., half:]
    return xp.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotate_vjp(x: Array, positions: Array, frequencies: tuple[float, ...], dy: Array) -> Array:
    """A rotation's transpose turns back."""
    return rotate(dy, -positions, frequencies)


class KeyValue(NamedTuple):
    """The keys and values of one layer, each (batch, groups, S, d). A cache is a tuple of them, one per layer."""

    k: Array
    v: Array

    @property
    def length(self) -> int:
        return int(self.k.shape[2])


def as_cache(key_values: Array, layers: int) -> tuple[KeyValue, ...]:
    """Keys and values in one array (layers, 2, batch, groups, S, d), as `splice.key_values` gives a prefix, for the first `layers` layers.

    PEFT makes as many as the encoder of an encoder-decoder has. A decoder of fewer layers leaves the others alone; one of more is an error.
    """
    if layers > key_values.shape[0]:
        raise ShapeError(
            f"keys and values {tuple(key_values.shape)} are for {key_values.shape[0]} layers, the model has {layers}.\n"
            "  The first axis is the layers; give the method `num_layers`."
        )
    return tuple(KeyValue(key_values[layer, 0, ...], key_values[layer, 1, ...]) for layer in range(layers))


def as_cache_vjp(key_values: Array, layers: int, d: tuple[KeyValue, ...]) -> Array:
    xp = namespace(key_values)
    return pad(xp.stack([xp.stack([*of], axis=0) for of in d], axis=0), 0, 0, key_values.shape[0] - layers)


def append(past: KeyValue | None, new: KeyValue) -> KeyValue:
    """`past` and behind it `new`."""
    if past is None:
        return new
    xp = namespace(past.k, new.k)
    return KeyValue(xp.concat([past.k, new.k], axis=2), xp.concat([past.v, new.v], axis=2))


def append_vjp(past: KeyValue | None, new: KeyValue, d: KeyValue) -> tuple[KeyValue | None, KeyValue]:
    if past is None:
        return None, d
    n = past.length
    return KeyValue(d.k[:, :, :n, :], d.v[:, :, :n, :]), KeyValue(d.k[:, :, n:, :], d.v[:, :, n:, :])


def positions_from(start: int, length: int, like: Array) -> Array:
    """start, start + 1, ...: shape (1, length)."""
    xp = namespace(like)
    return xp.expand_dims(xp.arange(start, start + length, device=None if xp is np else device(like)), axis=0)


def mask_bias(x: Array, attention_mask: Array | None, past: int = 0, *, causal: bool, what: str = "attention_mask") -> Array:
    """What is added to the scores of the tokens x (batch, T, ...) behind `past` earlier places: 0, or the lowest number where not to look.

    attention_mask (batch, past + T) is 0 at padding; one of four axes is taken as it is. With `causal` nobody looks ahead. The tokens'
    positions play no part. (HF, given position_ids that jump, no mask and use_cache=False, takes them for packed sequences; not here.)
    """
    xp = namespace(x)
    batch, T = x.shape[:2]
    S = past + T
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    place = positions_from(0, S, x)
    reach = xp.matrix_transpose(positions_from(past, T, x)) if causal else xp.full_like(place, S)
    seen = xp.reshape(place <= reach, (1, 1, -1, S))
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (batch, S):
            raise ShapeError(
                f"{what} is {tuple(attention_mask.shape)}, expected (batch, earlier + new tokens) = {(batch, S)}.\n"
                f"  {past} places are in front of the {T} tokens given (a cache or a prefix); they need a mask too."
            )
        seen = seen & xp.reshape(xp.astype(attention_mask, xp.bool), (batch, 1, 1, S))
    return xp.finfo(x.dtype).min * (1 - xp.astype(seen, x.dtype))
