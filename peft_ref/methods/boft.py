"""BOFT: turn the inputs of a layer by a product of block matrices whose blocks are dealt like the steps of an FFT, and scale its outputs.

    W' = diag(s) W M^T      M = G_m ... G_2 G_1      G_i = P_i blockdiag(C_i1, ..., C_in) P_i^T      n b = in      b' = b

    C = (I - Q) (I + Q)^-1    Q = (R - R^T) / 2    one R (b, b) for every block of every factor
    P_i P_i^T = I             in each stretch of b 2^(i-1) inputs its pieces of b / 2 are dealt: those at even places, then the others.
                              G_1 turns stretches of b as they are, so one factor is OFT's solved form

One factor after the other: with V the inputs in the order of the blocks, V' = V C^T, so dC = G^T V and dV = G C.  With A = (I + Q)^-1:
C = 2 A - I, dQ = -2 A^T dC A^T, dR = (dQ - dQ^T) / 2.   ds_j is row j of the turned weight times row j of the gradient.
R starts at zero and s at one, so a fresh adapter changes nothing. In training boft_dropout makes some blocks of one factor the identity.

Paper   Liu et al. 2023, arXiv:2311.06243
HF      peft.BOFTConfig. Where its CUDA kernel cannot be built, which is everywhere without CUDA, it takes one factor whatever the
        configuration says, and writes the configuration as it was. Here it is read as it is written. The forward pass of a convolution
        knows one stride, one padding and no dilation: refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, column, namespace, regroup, to
from peft_ref.contracts import Key, Reweight, Start, WeightGradients
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Conv, Layer, Linear
from peft_ref.methods.cayley import cayley, cayley_vjp

LINEAR = frozenset({"linear"})
CONV = frozenset({"conv2d"})


class Params(NamedTuple):
    R: Annotated[Array, "factors blocks size size", Key("boft_R", kinds=LINEAR | CONV)]
    s: Annotated[Array, "out", Key("boft_s", "out 1", LINEAR), Key("boft_s", "1 out", CONV)]


@final
@dataclass(frozen=True, kw_only=True)
class BOFT(Reweight[Params]):
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    init_weights: bool = True

    peft_type: ClassVar[str] = "BOFT"
    tuner_prefix: ClassVar[str] = "boft_"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONV
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        size, num = self.boft_block_size, self.boft_block_num
        if min(size, num) < 0 or (size == 0) == (num == 0):
            raise ConfigError(
                f"boft_block_size={size} and boft_block_num={num}: one of them is positive and the other 0 (HF PEFT refuses it too).\n"
                "  Their product is the number of inputs, so the other one follows."
            )
        if not 1 <= self.boft_n_butterfly_factor <= 63:  # factor i is for at least 2^(i-1) blocks
            raise ConfigError(f"boft_n_butterfly_factor={self.boft_n_butterfly_factor}: there are 1 to 63 factors.")

    def blocks(self, layer: Layer) -> tuple[int, int]:
        """How many blocks a factor has, and of what size."""
        n_in, asked = layer.shape[1], self.boft_block_size or self.boft_block_num
        other = n_in // asked
        n, b = (other, asked) if self.boft_block_size else (asked, other)
        stretches = 2 ** (self.boft_n_butterfly_factor - 1)
        if n_in % asked or n % stretches or (stretches > 1 and b % 2):
            raise UnsupportedLayerError(
                f"BOFT: {n_in} inputs are not cut into blocks as boft_block_size={self.boft_block_size},"
                f" boft_block_num={self.boft_block_num}, boft_n_butterfly_factor={self.boft_n_butterfly_factor} ask"
                " (HF PEFT refuses it too).\n"
                f"  Blocks times size are the inputs; more than one factor needs an even size and a multiple of {stretches} blocks."
            )
        return n, b

    def dims(self, layer: Layer) -> dict[str, int]:
        n, b = self.blocks(layer)
        return {"factors": self.boft_n_butterfly_factor, "blocks": n, "size": b}

    def check_geometry(self, layer: Layer) -> None:
        if not isinstance(layer, Conv):
            self.blocks(layer)
            return
        if layer.groups > 1 or len(set(layer.kernel_size)) > 1:
            raise UnsupportedLayerError(
                f"BOFT on a convolution with groups={layer.groups}, kernel_size={layer.kernel_size}: it turns all inputs of a square"
                " kernel without groups (HF PEFT refuses groups, and raises on another kernel)."
            )
        if any(d > 1 for d in layer.dilation) or len(set(layer.stride)) > 1 or len(set(layer.padding)) > 1:
            raise UnsupportedLayerError(
                f"BOFT on a convolution with stride={layer.stride}, padding={layer.padding}, dilation={layer.dilation}: HF PEFT takes the"
                " first stride and padding for both axes, and no dilation,\n  so there is nothing right to compare with."
            )
        self.blocks(layer)

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        R, s = shapes.get("boft_R", ()), shapes.get("boft_s", ())
        if len(R) != 4 or len(s) != 2:
            return None
        factors, n, b, _ = R
        if factors != self.boft_n_butterfly_factor:
            raise ConfigError(
                f"BOFT: boft_R holds {factors} factors, and boft_n_butterfly_factor is {self.boft_n_butterfly_factor}.\n"
                "  HF PEFT without its CUDA kernel trains one factor and leaves the configuration as it was: write what the file holds."
            )
        if s[1] == 1:
            return Linear(in_features=n * b, out_features=s[0])
        return Conv(in_channels=n * b, out_channels=s[1], kernel_size=(1, 1))

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        shape, out = (self.boft_n_butterfly_factor, *self.blocks(layer), self.blocks(layer)[1]), (layer.shape[0],)
        if self.init_weights:
            return Start(Params(to(np.zeros(shape), W), to(np.ones(out), W)), W)
        return Start(Params(to(rng.normal(0, 0.1, shape), W), to(rng.normal(1, 0.1, out), W)), W)

    def thinned(self, params: Params, keep: Array) -> Params:
        """A block of R that is zero turns nothing."""
        return params._replace(R=params.R * namespace(params.R).reshape(keep, (*keep.shape, 1, 1)))

    def kept_blocks(self, layer: Layer, rng: np.random.Generator) -> np.ndarray[Any, Any] | None:
        """All but int(boft_dropout n) blocks of one factor, both drawn."""
        n, _ = self.blocks(layer)
        if not (few := int(self.boft_dropout * n)):
            return None
        keep = np.ones((self.boft_n_butterfly_factor, n))
        keep[rng.integers(self.boft_n_butterfly_factor), rng.permutation(n)[:few]] = 0
        return keep

    def weight(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        for i, C in enumerate(rotations(p.R)):
            W = turned(W, C, i)
        return column(p.s) * W, b

    def weight_vjp(
        self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array, dW: Array, db: Array | None
    ) -> WeightGradients[Params]:
        xp, Cs, Ws = namespace(dW), rotations(p.R), [W]
        for i, C in enumerate(Cs):
            Ws.append(turned(Ws[-1], C, i))
        ds, dW, dRs = xp.sum(dW * Ws[-1], axis=1), column(p.s) * dW, []
        for i in reversed(range(len(Cs))):
            n, size = Cs[i].shape[:2]
            dC = xp.matrix_transpose(blocks(gathered(dW, i, size), n)) @ blocks(gathered(Ws[i], i, size), n)
            dQ = cayley_vjp(skew_part(p.R[i, ...]), dC)
            dRs.append(skew_part(dQ))
            dW = turned(dW, xp.matrix_transpose(Cs[i]), i)
        dRs.reverse()
        return WeightGradients(Params(xp.stack(dRs), ds), dW, db)

    def unmerge(self, layer: Layer, p: Params, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        Cs = rotations(p.R)
        W = W / column(p.s)
        for i in reversed(range(len(Cs))):
            W = turned(W, namespace(W).matrix_transpose(Cs[i]), i)
        return W, b


def skew_part(R: Array) -> Array:
    return 0.5 * (R - namespace(R).matrix_transpose(R))


def rotations(R: Array) -> list[Array]:
    """The blocks (n, b, b) of every factor, first to last."""
    return [cayley(skew_part(R[i, ...])) for i in range(R.shape[0])]


def turned(W: Array, C: Array, i: int) -> Array:
    """W G_i^T, counted from 0."""
    xp, (n, b) = namespace(W), C.shape[:2]
    V = blocks(gathered(W, i, b), n) @ xp.matrix_transpose(C)
    return dealt(regroup(xp.permute_dims(V, (1, 0, 2)), W.shape), i, b)


def blocks(W: Array, n: int) -> Array:
    """The columns of W (out, n b) as blocks (n, out, b)."""
    xp = namespace(W)
    return xp.permute_dims(xp.reshape(W, (W.shape[0], n, W.shape[1] // n)), (1, 0, 2))


def dealt(W: Array, i: int, b: int) -> Array:
    """W P_i^T: of every stretch of b 2^i columns the pieces of b / 2 at even places, then the others."""
    return W if i == 0 else _pieces(W, (2**i, 2), b)


def gathered(W: Array, i: int, b: int) -> Array:
    """W P_i: undoes `dealt`."""
    return W if i == 0 else _pieces(W, (2, 2**i), b)


def _pieces(W: Array, table: tuple[int, int], b: int) -> Array:
    """Every stretch's pieces laid out in a table row by row, and taken up column by column."""
    xp, (out, n_in) = namespace(W), W.shape
    piece = b // 2
    stretches = xp.reshape(W, (out, n_in // (table[0] * table[1] * piece), *table, piece))
    return regroup(xp.permute_dims(stretches, (0, 1, 3, 2, 4)), (out, n_in))
