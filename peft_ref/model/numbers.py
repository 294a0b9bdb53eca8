"""Arrays on their way in and out: what is computed in, what is kept, and in whose library.

16-bit floats are computed with in float32 and rounded once on the way back. HF keeps an adapter's parameters in the weight's dtype, but
never in 16 bits (autocast_adapter_dtype). A safe merge, and one into an embedding, rounds the delta first in HF, and then the sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_ref.arrays import Array, device, namespace
from peft_ref.files.safetensors import RawTensor
from peft_ref.graph.mapping import dtype_name

HALF = ("F16", "BF16")


def wide(x: Array) -> Array:
    """`x`, in float32 where it has 16 bits."""
    xp = namespace(x)
    return xp.astype(x, xp.float32) if dtype_name(x.dtype) in HALF else x


def as_stored(x: Array, like: Array) -> Array:
    """`x` in the dtype of `like`."""
    return x if x.dtype == like.dtype else namespace(x).astype(x, like.dtype)


def brought(tensor: Any, like: Array) -> Array:
    """A NumPy array from a file as a parameter on a weight: in its library, and in its dtype but for 16 bits."""
    array = np.asarray(tensor)
    if dtype_name(array.dtype) in (*HALF, "F32", "F64"):
        array = array.astype(np.float64 if dtype_name(like.dtype) == "F64" else np.float32, copy=False)
    xp = namespace(like)
    return array if xp is np else xp.asarray(array, device=device(like))


def to_file(x: Any) -> Any:
    """An array as NumPy's, for a file; what a file brought that NumPy has no dtype for stays as it is."""
    if isinstance(x, np.ndarray | RawTensor):
        return x
    if dtype_name(x.dtype) != "BF16":
        return np.asarray(x)
    import ml_dtypes

    return np.asarray(wide(x)).astype(ml_dtypes.bfloat16)  # exact: it came from there


def is_finite(x: Array | None) -> bool:
    return x is None or bool(namespace(x).all(namespace(x).isfinite(x)))
