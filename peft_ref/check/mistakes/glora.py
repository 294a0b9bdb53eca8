"""GLoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.distributions import Law, constant, normal, uniform
from peft_ref.check.mistake import Formula, Mistake, Suite, only, reread, stored
from peft_ref.check.oracle import Problem, answer, pose
from peft_ref.check.shared_mistakes import input_gradient_missing, merging, only_first_adapter
from peft_ref.check.variants import RUN, Draw, Variant
from peft_ref.layers import Layer
from peft_ref.methods.glora import GLoRA, value
from peft_ref.stack import Adapter

PLAIN = {"r": 3}
VECTORS = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
CONSTANTS = {"r": 2, "config_A_B": "constant"}


def odd(denominator: int, largest: int) -> Draw:
    """Odd numbers over a power of two, which do not add up to -1, where PEFT's unmerge divides by zero."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
        odds = range(1, largest + 1, 2)
        return rng.choice([sign * n / denominator for n in odds for sign in (1, -1)], shape)

    return draw


SAFE = {"Ad": odd(4, 3), "Au": odd(1, 1), "A": odd(4, 7), "D": odd(2, 3)}

VARIANTS = (
    Variant(name="plain", clause="GLORA-C1", configs=(PLAIN,), draws=SAFE),
    Variant(name="vectors", clause="GLORA-C5", configs=(VECTORS,), draws=SAFE),
    Variant(name="constants", clause="GLORA-C6", configs=(CONSTANTS,), draws=SAFE),
    Variant(name="nothing", clause="GLORA-C7", configs=({"config_A_B": "none", "config_C": "none", "config_D_E": "vector"},), draws=SAFE),
    Variant(name="no-bias", clause="GLORA-C3", configs=(PLAIN,), bias=False, draws=SAFE),
    Variant(
        name="small", clause="GLORA-C1", configs=({"r": 2},), numbers="small", draws={"Ad": odd(1, 1), "Au": odd(1, 1), "D": odd(2, 1)}
    ),
    Variant(name="rounded", clause="GLORA-C2", configs=(PLAIN,), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector-input", clause="GLORA-C1", configs=(PLAIN,), operations=RUN, rows=(), draws=SAFE),
    Variant(name="two-adapters", clause="GLORA-C11", configs=(PLAIN, VECTORS), draws={**SAFE, "A": odd(8, 7), "D": odd(4, 3)}),
)


class Values(NamedTuple):
    """The five of one adapter, products multiplied out."""

    A: Array
    B: Array
    C: Array
    D: Array
    E: Array


def values_of(a: Adapter) -> Values:
    p = a.params
    return Values(value(p.Ad, p.Au, p.A), value(p.Bd, p.Bu, p.B), value(p.Cd, p.Cu, p.C), p.D, p.E)


Change = Callable[[Array, Array, Values], tuple[Array, Array]]


def right(W: Array, b: Array, v: Values) -> tuple[Array, Array]:
    return W * v.A + v.B, b * v.D + v.E + (W @ v.C)[:, 0]


def changing(change: Change) -> Formula:
    """Another dW and db, given the frozen W and b."""

    def total(p: Problem, W: Array, b: Array | None, sign: float) -> tuple[Array, Array | None]:
        for a in p.adapters:
            dW, db = change(p.W, _bias(p.b, p.W), values_of(a))
            W, b = W + sign * dW, None if b is None else b + sign * db
        return W, b

    return Formula(weight=lambda p: total(p, p.W, p.b, 1.0), unmerge=lambda p: total(p, p.merged_W, p.merged_b, -1.0))


def _bias(b: Array | None, W: Array) -> Array:
    return W[:, 0] * 0.0 if b is None else b


def _composed(p: Problem) -> tuple[Array, Array | None]:
    W, b = p.W, p.b
    for a in p.adapters:
        dW, db = right(W, _bias(b, W), values_of(a))
        W, b = W + dW, None if b is None else b + db
    return W, b


def _uncomposed(p: Problem) -> tuple[Array, Array | None]:
    W, b = p.merged_W, p.merged_b
    for a in reversed(p.adapters):
        v = values_of(a)
        W = (W - v.B) / (1.0 + v.A)
        b = None if b is None else (b - v.E - (W @ v.C)[:, 0]) / (1.0 + v.D)
    return W, b


def _divided(case: Case) -> Answer:
    """As PEFT does: the sums of all adapters taken out at once."""
    p = pose(case)
    every = [values_of(a) for a in p.adapters]
    assert p.merged_W is not None
    W = (p.merged_W - sum(v.B for v in every)) / (1.0 + sum(v.A for v in every))
    shift = sum(v.E + (W @ v.C)[:, 0] for v in every)
    return stored(p.layer, W, None if p.merged_b is None else (p.merged_b - shift) / (1.0 + sum(v.D for v in every)))


def several(replay: Formula) -> Callable[[Case], Answer | None]:
    return lambda case: replay(case) if len(case.adapters) > 1 else None


def swapped(one: str, other: str) -> Callable[[Case], Answer | None]:
    """Two of the five read for one another; the gradient goes to where the number came from."""

    def change(v: Values) -> Values:
        return v._replace(**{one: getattr(v, other), other: getattr(v, one)})

    return changing(lambda W, b, v: right(W, b, change(v)))


def _mean_of_repeats(case: Case) -> Answer | None:
    """The gradient of a number that is repeated, averaged over its places instead of added up."""
    assert case.layer is not None
    method = [GLoRA(**{k: v for k, v in a.config.items() if k != "peft_type"}) for a in case.adapters]
    (out, n_in), found = case.layer.shape, {}
    for name, g in answer(case).items():
        if name.endswith(".X") and method[int(name[0])].forms(case.layer)[name[-3]] == "constant":
            found[name] = g / (out * n_in if name[-3] in "AB" else out)
        else:
            found[name] = g
    return found if any(not np.array_equal(g, answer(case)[name]) for name, g in found.items()) else None


def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
    method = GLoRA(**{k: v for k, v in config.items() if k != "peft_type"})
    forms, identity, found = method.forms(layer), config["init_weights"], {}
    for s in method.spec(layer):
        form = forms[s.field[0]]
        if form == "none" or (identity and not s.key.endswith("Xu")):
            found[s.key] = constant(0.0, "init-not-identity")
        else:
            found[s.key] = normal(0.02) if form == "constant" else uniform(1 / math.sqrt(s.shape[-1]))
    return found


FRESH = Fresh(
    clause="GLORA-C17",
    starts={
        "default": Start({"r": 4}),
        "vectors": Start(VECTORS),
        "false": Start({"r": 4, "init_weights": False}),
        "vectors-false": Start({**VECTORS, "init_weights": False}),
    },
    laws=laws,
)
FILES = Files(
    configs_clause="GLORA-C19",
    keys_clause="GLORA-C20",
    configs={"plain": {"r": 4}, "rank-missing": {}, "forms": {"r": 2, "config_A_B": "vector", "config_C": "none", "config_D_E": "vector"}},
    told={"r": "r"},
)


def _mistake(name: str, clause: str, sentence: str, replay: Any, **more: Any) -> Mistake:
    return Mistake(name=name, clause=clause, sentence=sentence, replay=replay, **more)


SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        _mistake(
            "frozen-dropped",
            "GLORA-C1",
            "W * A + B stands for the weight, without the frozen W beside it",
            changing(lambda W, b, v: (W * v.A + v.B - W, right(W, b, v)[1])),
        ),
        _mistake(
            "a-added",
            "GLORA-C1",
            "A is added to the weight instead of multiplied with it element by element",
            changing(lambda W, b, v: (v.A + v.B + W * 0.0, right(W, b, v)[1])),
        ),
        _mistake(
            "shift-scaled",
            "GLORA-C1",
            "B is added before the scale, so that it is scaled too: (W + B) (1 + A)",
            changing(lambda W, b, v: (W * v.A + v.B + v.A * v.B, right(W, b, v)[1])),
        ),
        _mistake("b-ignored", "GLORA-C1", "B is left out", changing(lambda W, b, v: (W * v.A, right(W, b, v)[1]))),
        _mistake(
            "bias-ignored",
            "GLORA-C2",
            "the bias stays as it is: C, D and E do nothing",
            changing(lambda W, b, v: (right(W, b, v)[0], b * 0.0)),
        ),
        _mistake("c-ignored", "GLORA-C2", "the bias does not receive W C", changing(lambda W, b, v: (right(W, b, v)[0], b * v.D + v.E))),
        _mistake(
            "c-of-new-weight",
            "GLORA-C2",
            "the bias receives W' C instead of W C",
            changing(lambda W, b, v: (right(W, b, v)[0], b * v.D + v.E + ((W + right(W, b, v)[0]) @ v.C)[:, 0])),
        ),
        _mistake(
            "bias-dropped",
            "GLORA-C2",
            "b * D + E + W C stands for the bias, without the frozen b beside it",
            changing(lambda W, b, v: (right(W, b, v)[0], right(W, b, v)[1] - b)),
        ),
        _mistake(
            "bias-shift-scaled",
            "GLORA-C2",
            "E and W C are added before the scale, so that D scales them too",
            changing(lambda W, b, v: (right(W, b, v)[0], b * v.D + (v.E + (W @ v.C)[:, 0]) * (1.0 + v.D))),
        ),
        _mistake("a-b-swapped", "GLORA-C1", "A and B are taken for one another", swapped("A", "B")),
        _mistake("d-e-swapped", "GLORA-C2", "D and E are taken for one another", swapped("D", "E")),
        _mistake("xu-transposed", "GLORA-C4", "the numbers of Xu are read as (in, r) instead of (r, in)", reread("Xu")),
        _mistake("xd-transposed", "GLORA-C4", "the numbers of Xd are read as (r, out) instead of (out, r)", reread("Xd")),
        only_first_adapter("GLORA-C11"),
        _mistake(
            "adapters-composed",
            "GLORA-C11",
            "each adapter starts from what the one before made, not from the frozen weight",
            several(Formula(weight=_composed, unmerge=_uncomposed)),
        ),
        *merging("GLORA-C12", "GLORA-C13"),
        _mistake(
            "unmerge-divides",
            "GLORA-C13",
            "unmerge divides by 1 + A and 1 + D, as HF PEFT does, instead of taking out what was added",
            only(unmerge=_divided),
            dialect=True,
        ),
        _mistake(
            "grad-of-repeats-averaged",
            "GLORA-C16",
            "the gradient of a number that is repeated is the mean over its places, not the sum",
            only(backward=_mean_of_repeats),
        ),
        input_gradient_missing("GLORA-C16"),
    ),
)
