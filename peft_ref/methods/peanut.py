"""PEANuT: a small network reads the frozen weight, one input's column after the other, and says what to add to it.

    W' = W + s B Z^T      Z (in, r) is the network's output for the rows of W^T

    Z_0 = f(W^T A^T)      Z_i = f(Z_(i-1) E_i^T)      Y_0 = Z_d,  Y_i = f(Y_(i-1) D_i^T) + Z_(d-i)      Z = Y_d

    A (r, out)    E_1..E_d, D_1..D_d (r, r)    B (out, r)      d = depth, s = scaling, f = act_fn

For a gradient G of W':  dB = s G Z,  dZ = s G^T B;  back through a layer Y = f(X M^T) of the network with U = f' * dY:  dM = U^T X,
dX = U M, and each Z_i also receives what its skip connection brings.  B starts at zero, so a fresh adapter changes nothing.
All is computed from the frozen W: several adapters add up.

Paper   Zhong et al. 2024, arXiv:2410.01870
HF      peft.PeanutConfig, on linear layers, with any act_fn of transformers.activations.ACT2FN, and any depth; here at most 8. Unmerging
        puts a copy of the frozen weight back, where here what was added is subtracted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.activations import FUNCTIONS
from peft_ref.arrays import Array, namespace, to, zeros_like
from peft_ref.conditioned import Conditioned
from peft_ref.contracts import Delta, Key, ParamSpec, Start
from peft_ref.errors import ConfigError
from peft_ref.layers import Layer
from peft_ref.ranges import one_of, positive

KINDS = frozenset({"linear"})
DEEPEST = 8


def _hidden(side: str, i: int) -> Any:
    return Annotated[Array, "r r", Key(f"peanut_{side}coders.{i}.weight", kinds=KINDS, when=f"depth > {i}")]


_NAMED: Any = NamedTuple  # mypy reads no list that is not written out: to it the fields are not known
Params: Any = _NAMED(
    "Params",
    [
        ("A", Annotated[Array, "r out", Key("peanut_A.weight", kinds=KINDS)]),
        ("B", Annotated[Array, "out r", Key("peanut_B.weight", kinds=KINDS)]),
        *((f"E{i + 1}", _hidden("en", i)) for i in range(DEEPEST)),
        *((f"D{i + 1}", _hidden("de", i)) for i in range(DEEPEST)),
    ],
)


class Layers(NamedTuple):
    """What the network's layers do for one weight: X (in, r) into each and what comes out of f, in their order."""

    seen: list[Array]
    before: list[Array]  # X M^T, before f
    out: Array


@final
@dataclass(frozen=True, kw_only=True)
class PEANuT(Conditioned[Any]):
    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    peft_type: ClassVar[str] = "PEANUT"
    tuner_prefix: ClassVar[str] = "peanut_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        positive(self, "r")
        if not 0 <= self.depth <= DEEPEST:
            raise ConfigError(f"depth={self.depth}: from 0 to {DEEPEST} here; HF PEFT takes any that is not negative.")
        one_of(self, "act_fn", *FUNCTIONS)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r, **{f"depth > {i}": int(self.depth > i) for i in range(DEEPEST)}}

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Any]:
        def fresh(s: ParamSpec) -> Array:
            bound = 1 / math.sqrt(s.shape[1])
            zero = s.field == "B" and self.init_weights
            return zeros_like(s.shape, W) if zero else to(rng.uniform(-bound, bound, s.shape), W)

        return Start(self.to_params(**{s.field: fresh(s) for s in self.spec(layer)}), W)

    def change(self, layer: Layer, p: Any, W0: Array, b0: Array | None) -> Delta:
        return Delta(self.scaling * (p.B @ namespace(W0).matrix_transpose(self._run(p, W0).out)))

    def change_vjp(self, layer: Layer, p: Any, W0: Array, b0: Array | None, d: Delta) -> tuple[Any, Array | None]:
        mT, run, names = namespace(W0).matrix_transpose, self._run(p, W0), self._names()
        grads = {"B": self.scaling * (d.W @ run.out)}
        dY = self.scaling * (mT(d.W) @ p.B)
        skips: list[Array] = []  # of every layer's output, the last layer's first: Z_i was added to the one that is i before the last
        for i in reversed(range(len(names))):
            if i < self.depth:
                dY = dY + skips[i]
            skips.append(dY)
            U = FUNCTIONS[self.act_fn].vjp(run.before[i], dY)
            grads[names[i]] = mT(U) @ run.seen[i]
            dY = U @ getattr(p, names[i])
        return self.to_params(**grads), None

    def _names(self) -> list[str]:
        """Of the network's matrices, in their order."""
        return ["A", *(f"{side}{i + 1}" for side in "ED" for i in range(self.depth))]

    def _run(self, p: Any, W0: Array) -> Layers:
        mT, f, d = namespace(W0).matrix_transpose, FUNCTIONS[self.act_fn].f, self.depth
        seen, before, out = [], [], mT(W0)
        for i, name in enumerate(self._names()):
            seen.append(out)
            before.append(out @ mT(getattr(p, name)))
            out = f(before[-1])
            if i > d:
                out = out + seen[2 * d - i + 1]  # what came out of layer 2 d - i
        return Layers(seen, before, out)
