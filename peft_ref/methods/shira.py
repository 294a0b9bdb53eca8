"""SHiRA: add a sparse matrix, a few entries of the weight at places that never change.

    W' = W + D      D[indices[0, k], indices[1, k]] = w[k], zero elsewhere      w (n,)    indices (2, n)      n = r (in + out)

For a gradient G of W':   dw[k] = G[indices[0, k], indices[1, k]].   The places are saved with the adapter and not trained.
A fresh w is zero, so a fresh adapter changes nothing. The rank of D is as it comes: r only counts numbers, as many as LoRA's.

Paper   arXiv:2406.13175
HF      peft.ShiraConfig, on linear layers. The places are the first n of torch's random permutation of the weight's entries, sorted row by
        row; without random_seed from a generator that has the same seed in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, integers, namespace, scattered, to, zeros_like
from peft_ref.contracts import Additive, Delta, Key, Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.torch_draws import UNSEEDED, randperm
from peft_ref.ranges import positive

KINDS = frozenset({"linear"})


class Params(NamedTuple):
    w: Annotated[Array, "n", Key("shira_weight", kinds=KINDS)]
    indices: Annotated[Array, "2 n", Key("shira_indices", kinds=KINDS, trained=False)]


@final
@dataclass(frozen=True, kw_only=True)
class SHiRA(Additive[Params]):
    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    init_weights: bool = True

    peft_type: ClassVar[str] = "SHIRA"
    tuner_prefix: ClassVar[str] = "shira_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r")

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"n": self.r * sum(layer.shape)}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        """n is r (in + out), and how the sum is shared no shape tells: as evenly as it can be, on the smallest weight with as many."""
        both = shapes.get("shira_weight", (0,))[0] // self.r
        return Linear(in_features=both - both // 2, out_features=both // 2) if both > 1 else None

    def check_geometry(self, layer: Layer) -> None:
        (out, n_in), n = layer.shape, self.dims(layer)["n"]
        if n > out * n_in:
            raise UnsupportedLayerError(
                f"SHiRA: r={self.r} asks for {n} places in a weight of {out} x {n_in} (HF PEFT refuses it too).\n"
                f"  Use r of at most {out * n_in // (out + n_in)} here."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        if self.mask_type != "random":
            raise ConfigError(f"mask_type={self.mask_type!r}: its places come from a function of somebody's own.\n  Bring the indices.")
        (out, n_in), n = layer.shape, self.dims(layer)["n"]
        places = np.sort(randperm(out * n_in, UNSEEDED if self.random_seed is None else self.random_seed, n))
        w = zeros_like((n,), W) if self.init_weights else to(rng.normal(size=n), W)
        return Start(Params(w, integers(np.stack(np.divmod(places, n_in)), W, "int32")), W)

    def delta(self, layer: Layer, p: Params) -> Delta:
        return Delta(namespace(p.w).reshape(scattered(p.w, self._flat(layer, p), layer.shape[0] * layer.shape[1]), layer.shape))

    def delta_vjp(self, layer: Layer, p: Params, d: Delta) -> Params:
        xp = namespace(d.W)
        return Params(xp.take(xp.reshape(d.W, (-1,)), self._flat(layer, p)), None)

    def _flat(self, layer: Layer, p: Params) -> Array:
        """Every place as one number, row by row."""
        xp = namespace(p.indices)
        at = xp.astype(p.indices, xp.int64)
        return at[0, :] * layer.shape[1] + at[1, :]
