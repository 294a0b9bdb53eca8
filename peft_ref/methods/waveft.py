"""WaveFT: add an inverse wavelet transform of a few learned coefficients.

    W' = W + D      D = s sum_k c_k r_k q_k^T      c (n,)    r_k (out,)    q_k (in,)    s = scaling

One level of synthesis, with h the low-pass filter of the family, of L numbers, and g_t = (-1)^t h_(L-1-t) the high-pass one. The spectrum
has H rows, out + L - 2 and one more where that is odd, and V columns, from `in` alike; the places drawn in (out, in) stand in its middle.
For a place (i, j) of the spectrum, with k = i mod H/2 and l = j mod V/2:
    r[x] = f[x + L - 2 - 2 k]    f = g where j lies in the right half, else h
    q[y] = f[y + L - 2 - 2 l]    f = g where i lies in the lower half, else h       zero where the filter has no such number
With use_idwt=False r and q are rows of the identity: c_k stands at its place. For a gradient G of W':   dc_k = s r_k^T G q_k.
A fresh c is zero, so a fresh adapter changes nothing.

Paper   PEFT's documentation names none
HF      peft.WaveFTConfig, on linear layers and Conv1D. The places are the first n of torch's random permutation, not saved. Filters of
        db11 to db38, sym11 to sym20 and coif6 to coif17 are promised and missing, coif5's is broken, coif4's is no wavelet: WAVEFT-Q1, Q2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeAlias, final

import numpy as np

from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.torch_draws import randperm
from peft_ref.methods.wavelets import LOW_PASS
from peft_ref.ranges import positive

Host: TypeAlias = np.ndarray[Any, Any]

KINDS = frozenset({"linear", "transposed_linear"})
NAMED = {f"{family}{n}" for family, first, last in (("db", 1, 38), ("sym", 2, 20), ("coif", 1, 17)) for n in range(first, last + 1)}


class Params(NamedTuple):
    c: Annotated[Array, "n", Key("waveft_spectrum", kinds=KINDS)]


@final
@dataclass(frozen=True, kw_only=True)
class WaveFT(Additive[Params]):
    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    init_weights: bool = True
    proportional_parameters: bool = False
    budget: int = 0  # of all layers together, and how many entries their weights have: no keys of adapter_config.json
    entries: int = 0

    peft_type: ClassVar[str] = "WAVEFT"
    tuner_prefix: ClassVar[str] = "waveft_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "n_frequency")
        if self.wavelet_family not in NAMED:
            raise ConfigError(
                f"wavelet_family={self.wavelet_family!r} is none of db1 to db38, sym2 to sym20, coif1 to coif17 (HF PEFT refuses it too).\n"
                "  Haar's wavelet is db1."
            )
        if self.use_idwt and self.wavelet_family not in LOW_PASS:
            raise ConfigError(
                f"wavelet_family={self.wavelet_family!r}: no filter is known for it (HF PEFT makes the adapter and crashes in forward).\n"
                f"  There are {', '.join(LOW_PASS)}."
            )

    def spanning(self, layers: Mapping[str, Layer]) -> Self:
        if not self.proportional_parameters:
            return self
        return replace(self, budget=self.n_frequency * len(layers), entries=sum(math.prod(layer.shape) for layer in layers.values()))

    def count(self, layer: Layer) -> int:
        """n of a layer; of one by itself n_frequency, whether it is shared out or not."""
        if not (self.proportional_parameters and self.entries):
            return self.n_frequency
        return max(1, round(math.prod(layer.shape) / self.entries * self.budget))

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"n": self.count(layer)}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        """Any layer has any number of coefficients, up to its entries: the smallest that has so many."""
        if self.proportional_parameters and not self.entries:
            raise ConfigError(
                "proportional_parameters: how many coefficients a layer has, all layers say together.\n  Pass `layers`, the model's."
            )
        return Linear(in_features=self.n_frequency, out_features=1) if "waveft_spectrum" in shapes else None

    def check_geometry(self, layer: Layer) -> None:
        if self.count(layer) > math.prod(layer.shape):
            raise UnsupportedLayerError(
                f"WaveFT: n_frequency={self.count(layer)} is more than the {math.prod(layer.shape)} entries of a weight of"
                f" {layer.shape[0]} x {layer.shape[1]} (HF PEFT refuses it too).\n  Use less, or n_frequency_pattern for this layer."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        n = self.count(layer)
        return Start(Params(zeros_like((n,), W) if self.init_weights else to(rng.normal(0, 0.01, n), W)), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        rows, columns = self._waves(layer, p.c)
        return Delta(self.scaling * ((rows * p.c) @ namespace(p.c).matrix_transpose(columns)))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        rows, columns = self._waves(layer, d.W)
        return Params(self.scaling * namespace(d.W).sum(rows * (d.W @ columns), axis=0))

    def places(self, layer: Layer) -> tuple[Host, Host]:
        """The row and the column of every coefficient, before the spectrum is widened."""
        out, n_in = layer.shape
        i, j = np.divmod(randperm(out * n_in, self.random_loc_seed, self.count(layer)), n_in)
        return i, j

    def tables(self, layer: Layer, places: tuple[Host, Host]) -> tuple[Host, Host]:
        """The r_k as columns (out, n) and the q_k as columns (in, n)."""
        (out, n_in), (i, j) = layer.shape, places
        if not self.use_idwt:
            return np.eye(out)[:, i], np.eye(n_in)[:, j]
        low = np.asarray(LOW_PASS[self.wavelet_family])
        (i, below), (j, right) = (_half(at, size, len(low) - 2) for at, size in ((i, out), (j, n_in)))
        return pulses(low, out, i, right) / 2, pulses(low, n_in, j, below)  # each filter is sqrt(2) too large

    def _waves(self, layer: Layer, like: Array) -> tuple[Array, Array]:
        rows, columns = self.tables(layer, self.places(layer))
        return to(rows, like), to(columns, like)


def _half(at: Host, size: int, more: int) -> tuple[Host, Host]:
    """Where a place stands in its half of a widened axis, and whether that is the second half."""
    wide = size + more
    wide += wide % 2
    second, k = np.divmod(at + (wide - size) // 2, wide // 2)
    return k, second == 1


def pulses(low: Host, size: int, k: Host, high: Host) -> Host:
    """Of every coefficient what it adds along one axis: the filter, 2 k places on, its first L - 2 places cut off."""
    L = len(low)
    filters = np.stack([low, np.where(np.arange(L) % 2, -low[::-1], low[::-1])])
    t = np.arange(size)[:, None] + (L - 2) - 2 * k
    return np.where((t >= 0) & (t < L), filters[high.astype(int), np.clip(t, 0, L - 1)], 0.0)
