"""GLoRA: scale and shift a frozen weight and its bias, and let the weight shift the bias.

    W' = W + W * A + B        b' = b + b * D + E + W C

A and B are each of one form, config_A_B; C of config_C; D and E of config_D_E. * goes element by element, and what is smaller is repeated:

    form        A, B                   C                     D, E
    lora        Xd (out, r) Xu (r, in) Xd (in, r) Xu (r, 1)  -
    vector      (out, 1)               (in, 1)               (out,)
    constant    one number             -                     one number
    none        zeros (out, in)        zeros (in, 1)         zeros (out,)

For gradients G of W' and g of b':  dA = W * G,  dB = G,  dC = W^T g,  dD = b * g,  dE = g,  each summed over what was repeated;
of a product dXd = dA Xu^T, dXu = Xd^T dA. The bias itself receives g + D * g.  Xd, and what is no product, start at zero.
All is computed from the frozen W and b: several adapters add up. On a layer without a bias C, D and E are "none" and do not act.

Paper   Chavan et al. 2023, arXiv:2306.07967; PEFT's source cites none
HF      peft.GloraConfig, on linear layers. What is "none" is a buffer of zeros that is saved and loaded, and acts with what is in it.
        Unmerging divides by 1 + A and 1 + D, where here what was added is subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, sum_to, to, zeros_like
from peft_ref.conditioned import Conditioned
from peft_ref.contracts import Delta, Key, ParamSpec, Start
from peft_ref.layers import Layer, Linear
from peft_ref.ranges import not_negative, one_of, positive

KINDS = frozenset({"linear"})
FORMS = {
    "config_A_B": ("lora", "vector", "constant", "none"),
    "config_C": ("lora", "vector", "none"),
    "config_D_E": ("vector", "constant", "none"),
}


WORD = {"A": "config_A_B", "B": "config_A_B", "C": "config_C", "D": "config_D_E", "E": "config_D_E"}


def _is(name: str, form: str) -> str:
    return f'{WORD[name]}="{form}"'


def _x(name: str, vector: str, zeros: str) -> tuple[Key, ...]:
    """The keys of what is no product, by its form."""
    stored = {"vector": ("X", vector), "constant": ("X", "1"), "none": ("zeros", zeros)}
    forms = {form: at for form, at in stored.items() if form in FORMS[WORD[name]]}
    return tuple(Key(f"glora_{name}.{end}", shape, KINDS, _is(name, form), form != "none") for form, (end, shape) in forms.items())


def _factor(name: str, end: str) -> Key:
    return Key(f"glora_{name}.{end}", None, KINDS, _is(name, "lora"))


class Params(NamedTuple):
    Ad: Annotated[Array, "out r", _factor("A", "Xd")]
    Au: Annotated[Array, "r in", _factor("A", "Xu")]
    A: Annotated[Array, "rows_A columns_A", *_x("A", "out 1", "out in")]
    Bd: Annotated[Array, "out r", _factor("B", "Xd")]
    Bu: Annotated[Array, "r in", _factor("B", "Xu")]
    B: Annotated[Array, "rows_A columns_A", *_x("B", "out 1", "out in")]
    Cd: Annotated[Array, "in r", _factor("C", "Xd")]
    Cu: Annotated[Array, "r 1", _factor("C", "Xu")]
    C: Annotated[Array, "in 1", *_x("C", "in 1", "in 1")]
    D: Annotated[Array, "rows_D", *_x("D", "out", "out")]
    E: Annotated[Array, "rows_D", *_x("E", "out", "out")]


@final
@dataclass(frozen=True, kw_only=True)
class GLoRA(Conditioned[Params]):
    r: int = 8
    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool = True

    peft_type: ClassVar[str] = "GLORA"
    tuner_prefix: ClassVar[str] = "glora_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params

    def __post_init__(self) -> None:
        for name, forms in FORMS.items():
            one_of(self, name, *forms)
        (positive if "lora" in (self.config_A_B, self.config_C) else not_negative)(self, "r")

    def forms(self, layer: Layer) -> dict[str, str]:
        """The form of each of the five on this layer."""
        bias = (self.config_C, self.config_D_E, self.config_D_E) if layer.bias else ("none",) * 3
        return dict(zip("ABCDE", (self.config_A_B, self.config_A_B, *bias), strict=True))

    def dims(self, layer: Layer) -> dict[str, int]:
        forms, (out, n_in) = self.forms(layer), layer.shape
        switches = {_is(name, form): int(forms[name] == form) for name in "ACD" for form in FORMS["config_A_B"]}
        rows = {"rows_A": 1 if forms["A"] == "constant" else out, "rows_D": 1 if forms["D"] == "constant" else out}
        return {"r": self.r, **rows, "columns_A": n_in if forms["A"] == "none" else 1, **switches}

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        """A layer without a bias has zeros where the configuration says something else."""
        rows = [
            shape for key, shape in shapes.items() if key in ("glora_A.Xd", "glora_A.zeros") or (key == "glora_A.X" and len(shape) == 2)
        ]
        rows += [shape for key, shape in shapes.items() if key in ("glora_D.zeros", "glora_D.X")]
        columns = [shape[1] for key, shape in shapes.items() if key in ("glora_A.Xu", "glora_A.zeros")]
        columns += [shape[0] for key, shape in shapes.items() if key in ("glora_C.Xd", "glora_C.X", "glora_C.zeros")]
        if not rows or not columns:
            return None
        bare = ("glora_C.zeros" in shapes or self.config_C == "none") and ("glora_D.zeros" in shapes or self.config_D_E == "none")
        return Linear(in_features=columns[0], out_features=rows[0][0], bias=not bare)

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        def fresh(s: ParamSpec) -> Array:
            form, bound = self.forms(layer)[s.field[0]], 1 / math.sqrt(s.shape[-1])
            if form == "none" or (self.init_weights and not s.field.endswith("u")):
                return zeros_like(s.shape, W)
            return to(rng.normal(0.0, 0.02, s.shape) if form == "constant" else rng.uniform(-bound, bound, s.shape), W)

        return Start(self.to_params(**{s.field: fresh(s) for s in self.spec(layer)}), W)

    def change(self, layer: Layer, p: Params, W0: Array, b0: Array | None) -> Delta:
        A, B, C = value(p.Ad, p.Au, p.A), value(p.Bd, p.Bu, p.B), value(p.Cd, p.Cu, p.C)
        return Delta(W0 * A + B, None if b0 is None else b0 * p.D + p.E + (W0 @ C)[:, 0])

    def change_vjp(self, layer: Layer, p: Params, W0: Array, b0: Array | None, d: Delta) -> tuple[Params, Array | None]:
        forms, xp = self.forms(layer), namespace(d.W)
        G, W0T = d.W, xp.matrix_transpose(W0)
        g = zeros_like((W0.shape[0],), d.W) if d.b is None or b0 is None else d.b
        full = {"A": W0 * G, "B": G, "C": W0T @ xp.reshape(g, (-1, 1)), "D": g if b0 is None else b0 * g, "E": g}
        grads: dict[str, Array | None] = {}
        for end, form in forms.items():
            if form == "lora":
                down, up = getattr(p, f"{end}d"), getattr(p, f"{end}u")
                grads |= {f"{end}d": full[end] @ xp.matrix_transpose(up), f"{end}u": xp.matrix_transpose(down) @ full[end]}
            elif form != "none":
                grads[end] = sum_to(full[end], getattr(p, end).shape)
        return self.to_params(**grads), None if d.b is None or b0 is None else p.D * d.b


def value(down: Array | None, up: Array | None, x: Array | None) -> Array:
    """A product, or what is none."""
    return x if down is None else down @ up
