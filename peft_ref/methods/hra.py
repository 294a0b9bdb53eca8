"""HRA: multiply the frozen weight by r Householder reflections, of its inputs.

    W' = W H_1 H_2 ... H_r      H_k = I - 2 n_k n_k^T      n_k = u_k / |u_k|      b' = b        u_k: column k of u (in, r)
    W' = W (I - 2 N N^T)        apply_GS: N are u's columns made orthonormal, first to last (Gram-Schmidt)

With W_k = W_{k-1} H_k, and G a gradient of W_k:   dn_k = -2 (W_{k-1}^T G n_k + G^T W_{k-1} n_k)    dW_{k-1} = G H_k
    du_k = (dn_k - n_k (n_k . dn_k)) / |u_k|;   with apply_GS dN = -2 (W^T G N + G^T W N), and from N to u in `normals.orthonormal_vjp`.
A product of r reflections has determinant (-1)^r.  With r even a fresh u has its columns in equal pairs, whose reflections cancel, so a
fresh adapter changes nothing.

Paper   Yuan et al. 2024, arXiv:2405.17484
HF      peft.HRAConfig, on linear layers and 2-d convolutions with a square kernel. With r odd a fresh adapter is no identity; with apply_GS
        and r even its equal pairs make Gram-Schmidt divide by a rounding error. The forward pass of a convolution knows one stride, one
        padding and no dilation: refused here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, outer, to
from peft_ref.contracts import Key, Reweight, Start, WeightGradients
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Conv, Layer
from peft_ref.methods.normals import columns, orthonormal, orthonormal_vjp, unit, unit_vjp
from peft_ref.ranges import positive

KINDS = frozenset({"linear", "conv2d"})


class Params(NamedTuple):
    u: Annotated[Array, "in r", Key("hra_u", kinds=KINDS)]


@final
@dataclass(frozen=True, kw_only=True)
class HRA(Reweight[Params]):
    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True

    peft_type: ClassVar[str] = "HRA"
    tuner_prefix: ClassVar[str] = "hra_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r")

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r}

    def check_geometry(self, layer: Layer) -> None:
        if self.apply_GS and self.r > layer.shape[1]:
            raise UnsupportedLayerError(
                f"HRA: apply_GS with r={self.r}, and only {layer.shape[1]} inputs: no more vectors than that are orthogonal"
                " (HF PEFT divides by a rounding error).\n  Take a smaller r, or no apply_GS."
            )
        if not isinstance(layer, Conv):
            return
        if layer.groups > 1 or len(set(layer.kernel_size)) > 1:
            raise UnsupportedLayerError(
                f"HRA on a convolution with groups={layer.groups}, kernel_size={layer.kernel_size}: it reflects all inputs of a square"
                " kernel without groups (HF PEFT refuses groups, and raises on another kernel)."
            )
        if any(d > 1 for d in layer.dilation) or len(set(layer.stride)) > 1 or len(set(layer.padding)) > 1:
            raise UnsupportedLayerError(
                f"HRA on a convolution with stride={layer.stride}, padding={layer.padding}, dilation={layer.dilation}: HF PEFT takes the"
                " first stride and padding for both axes, and no dilation,\n  so there is nothing right to compare with."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        pairs = self.init_weights and self.r % 2 == 0
        drawn = self.r // 2 if pairs else self.r
        bound = 1 / math.sqrt(drawn)
        u = rng.uniform(-bound, bound, (layer.shape[1], drawn))
        return Start(Params(to(np.repeat(u, 2, axis=1) if pairs else u, W)), W)

    def weight(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        for n in self._normals(p):
            W = _reflect(W, n)
        return W, b

    def weight_vjp(
        self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None
    ) -> WeightGradients[Params]:
        xp, normals = namespace(dW), self._normals(p)
        Ws = [W]
        for n in normals[:-1]:
            Ws.append(_reflect(Ws[-1], n))
        dnormals = []
        for n, before in zip(reversed(normals), reversed(Ws), strict=True):
            dnormals.append(-2.0 * ((dW @ n) @ before + (before @ n) @ dW))
            dW = _reflect(dW, n)
        dnormals.reverse()
        back = (orthonormal_vjp if self.apply_GS else unit_vjp)(columns(p.u), dnormals)
        return WeightGradients(Params(xp.stack(back, axis=1)), dW, db)

    def unmerge(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        for n in reversed(self._normals(p)):
            W = _reflect(W, n)
        return W, b

    def _normals(self, p: Params) -> list[Array]:
        """The unit vectors that are reflected, one after the other."""
        return (orthonormal if self.apply_GS else unit)(columns(p.u))


def _reflect(W: Array, n: Array) -> Array:
    """W (I - 2 n n^T)."""
    return W - 2.0 * outer(W @ n, n)
