"""FourierFT: add the real part of an inverse Fourier transform whose few coefficients are learned.

    W' = W + D      D_ij = s/(out in) sum_k c_k cos(2 pi (u_k i / out + v_k j / in))      c (n,)      s = scaling

The frequencies (u_k, v_k) are drawn from the seed and the layer's sizes, are not saved, and are the same wherever these are.
For a gradient G of W':   dc_k = s/(out in) sum_ij G_ij cos(2 pi (u_k i / out + v_k j / in)).
As cos(a + b) = cos a cos b - sin a sin b, both are two matrix products with waves along the rows and along the columns: no transform is
needed, and nothing but the waves is rounded. A large weight in NumPy is transformed all the same: `half_spectrum.py`.
A fresh c is standard normal: it changes the layer, but with init_weights=True.

Paper   arXiv:2405.03003
HF      peft.FourierFTConfig, on linear layers and `Conv1D`, in float32 by torch's ifft2. The places are the first n of torch's random
        permutation of the weight's entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref import dense
from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.half_spectrum import waves, waves_vjp
from peft_ref.methods.torch_draws import randperm
from peft_ref.ranges import positive

KINDS = frozenset({"linear", "transposed_linear"})


class Params(NamedTuple):
    c: Annotated[Array, "n", Key("fourierft_spectrum", kinds=KINDS)]


class Waves(NamedTuple):
    """cos and sin of 2 pi u_k i / out, (out, n), and of 2 pi v_k j / in, (in, n)."""

    cos_rows: Array
    sin_rows: Array
    cos_columns: Array
    sin_columns: Array


@final
@dataclass(frozen=True, kw_only=True)
class FourierFT(Additive[Params]):
    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    init_weights: bool = False

    peft_type: ClassVar[str] = "FOURIERFT"
    tuner_prefix: ClassVar[str] = "fourierft_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "n_frequency")

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"n": self.n_frequency}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        """Any layer has any number of frequencies, up to its entries: the smallest that has so many."""
        return Linear(in_features=self.n_frequency, out_features=1) if "fourierft_spectrum" in shapes else None

    def check_geometry(self, layer: Layer) -> None:
        if self.n_frequency > math.prod(layer.shape):
            raise UnsupportedLayerError(
                f"FourierFT: n_frequency={self.n_frequency} is more than the {math.prod(layer.shape)} entries of a weight of"
                f" {layer.shape[0]} x {layer.shape[1]} (HF PEFT refuses it too).\n  Use less, or n_frequency_pattern for this layer."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        n = self.n_frequency
        return Start(Params(zeros_like((n,), W) if self.init_weights else to(rng.normal(size=n), W)), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        if _is_large(layer, p.c):
            return Delta(waves(self._scale(layer) * p.c, *self.frequencies(layer), layer.shape))
        mT, w = namespace(p.c).matrix_transpose, self._waves(layer, p.c)
        both = (w.cos_rows * p.c) @ mT(w.cos_columns) - (w.sin_rows * p.c) @ mT(w.sin_columns)
        return Delta(self._scale(layer) * both)

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        if _is_large(layer, d.W):
            return Params(self._scale(layer) * waves_vjp(d.W, *self.frequencies(layer)))
        xp, w = namespace(d.W), self._waves(layer, d.W)
        dc = xp.sum(w.cos_rows * (d.W @ w.cos_columns) - w.sin_rows * (d.W @ w.sin_columns), axis=0)
        return Params(self._scale(layer) * dc)

    def frequencies(self, layer: Layer) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """u (n,) and v (n,): the row and the column of every coefficient in the spectrum."""
        out, n_in = layer.shape
        u, v = np.divmod(randperm(out * n_in, self.random_loc_seed, self.n_frequency), n_in)
        return u, v

    def _scale(self, layer: Layer) -> float:
        return self.scaling / math.prod(layer.shape)

    def _waves(self, layer: Layer, like: Array) -> Waves:
        (out, n_in), (u, v) = layer.shape, self.frequencies(layer)
        tables = (*turns(np.outer(np.arange(out), u), out), *turns(np.outer(np.arange(n_in), v), n_in))
        return Waves(*(to(table, like) for table in tables))


def _is_large(layer: Layer, like: Array) -> bool:
    return math.prod(layer.shape) >= dense.LEAST and type(like) is np.ndarray and like.dtype in (np.float32, np.float64)


def turns(m: np.ndarray[Any, Any], n: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """cos and sin of m n-ths of a turn; at its quarters exactly."""
    m = m % n
    quarter = 4 * m % n == 0
    found = (f(2 * np.pi * m / n) for f in (np.cos, np.sin))
    cos, sin = (np.where(quarter, np.round(x), x) for x in found)
    return cos, sin
