"""PSOFT: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_ref.arrays import Array, column
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Case, NDArray
from peft_ref.check.distributions import Law, constant, normal
from peft_ref.check.mistake import Mistake, Replay, Suite, as_if, as_if_tensors, with_config, with_scale
from peft_ref.check.shared_mistakes import dropout, input_gradient_missing, merging, only_first_adapter, other_delta, parameter_gradients
from peft_ref.check.tape import constant as held
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.cayley import cayley, coefficients, neumann, skew

SOLVED = {"r": 4, "psoft_alpha": 6}
FREE = {**SOLVED, "psoft_orth": False}
PLAIN = {**SOLVED, "psoft_mag_a": False, "psoft_mag_b": False}
SERIES = {**SOLVED, "use_cayley_neumann": True}
SHORT = {**SERIES, "cayley_neumann_eps": 0.4}


def unit(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """Q is the product by a quaternion, Q^2 = -3, so that C has entries of one half."""
    a, b, c = rng.choice([-1.0, 1.0], 3)
    return np.asarray([a, b, c, c, -b, a])


def small_angles(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return rng.choice([-0.25, -0.125, 0.125, 0.25], shape)


UNIT, SMALL = {"q": unit}, {"q": small_angles}

VARIANTS = (
    Variant(name="solved", clause="PSOFT-C4", configs=(SOLVED,), draws=UNIT),
    Variant(name="any-angle", clause="PSOFT-C4", configs=(SOLVED,), draws=SMALL),
    Variant(name="plain", clause="PSOFT-C8", configs=(PLAIN,), draws=UNIT),
    Variant(name="outputs-alone", clause="PSOFT-C8", configs=({**SOLVED, "psoft_mag_a": False},), draws=UNIT),
    Variant(name="inputs-alone", clause="PSOFT-C8", configs=({**SOLVED, "psoft_mag_b": False},), draws=UNIT),
    Variant(name="free", clause="PSOFT-C7", configs=(FREE,)),
    Variant(name="series", clause="PSOFT-C5", configs=(SERIES,), draws=SMALL),
    *(
        Variant(name=f"terms-{n}", clause="PSOFT-C5", configs=({**SERIES, "num_cayley_neumann_terms": n},), draws=SMALL)
        for n in (1, 2, 3, 4, 6)
    ),
    Variant(name="short", clause="PSOFT-C6", configs=(SHORT,), draws=SMALL),
    Variant(name="short-enough", clause="PSOFT-C6", configs=({**SHORT, "cayley_neumann_eps": 0.9},), draws=SMALL),
    Variant(
        name="rounded", clause="PSOFT-C2", configs=({"r": 3, "psoft_alpha": 5},), layers=("linear-large",), numbers="rounded", draws=SMALL
    ),
    Variant(name="vector", clause="PSOFT-C1", configs=(SOLVED,), operations=RUN, rows=(), draws=UNIT),
    Variant(name="no-bias", clause="PSOFT-C1", configs=(SOLVED,), bias=False, draws=UNIT),
    Variant(name="dropout", clause="PSOFT-C11", configs=(SOLVED,), operations=RUN, dropout=0.25, draws=UNIT),
    Variant(name="two-adapters", clause="PSOFT-C10", configs=(SOLVED, {**FREE, "r": 2, "psoft_alpha": 8}), draws=UNIT),
)

Core = Callable[[Any, Any], Array]  # method and parameters: C


def core(method: Any, p: Any) -> Array:
    return method._core(p)


def scaled(C: Array, p: Any) -> Array:
    C = C if p.v_b is None else column(p.v_b) * C
    return C if p.v_a is None else C * p.v_a


def delta(of_core: Core = core, turn: Callable[[Array, Any], Array] | None = None) -> Replay:
    """A delta with another C, or another R - I of it."""

    def made(layer: Layer, method: Any, p: Any, W0: Array) -> Array:
        C = of_core(method, p)
        middle = scaled(C, p) - np.eye(method.r) if turn is None else turn(C, p)
        return method.scale * (p.B @ middle @ p.A)

    return other_delta(made)


def where(asked: Callable[[Mapping[str, Any]], bool], replay: Replay) -> Replay:
    return lambda case: replay(case) if any(asked(a.config) for a in case.adapters) else None


def orthogonal(config: Mapping[str, Any]) -> bool:
    return bool(config["psoft_orth"])


def series(config: Mapping[str, Any]) -> bool:
    return bool(config["psoft_orth"] and config["use_cayley_neumann"])


def shortened(config: Mapping[str, Any]) -> bool:
    return series(config) and config["cayley_neumann_eps"] is not None


def other_core(made: Callable[[Any, Array], Array]) -> Core:
    """Another C from the numbers q that act; a free one stays."""
    return lambda method, p: made(method, method._shortened(p.q)) if method.psoft_orth else p.C


def _of(method: Any, Q: Array) -> Array:
    return (neumann(Q, method.num_cayley_neumann_terms) if method.use_cayley_neumann else cayley(-Q))[0]


def _triangle(method: Any, q: Array) -> Array:
    return _of(method, skew(q.reshape(1, -1), method.r) * np.triu(np.ones((method.r, method.r)), 1))


def _by_columns(method: Any, q: Array) -> Array:
    r = method.r
    reading = [(i, j) for i in range(r) for j in range(i + 1, r)]
    columns = sorted(reading, key=lambda at: (at[1], at[0]))
    return _of(method, skew(q[[columns.index(at) for at in reading]].reshape(1, -1), r))


def _series(coefficient: Callable[[int], list[float]]) -> Core:
    def made(method: Any, q: Array) -> Array:
        Q = skew(q.reshape(1, -1), method.r)
        if not method.use_cayley_neumann:
            return _of(method, Q)
        R, power = np.eye(method.r) + 0.0 * Q, None
        for c in coefficient(method.num_cayley_neumann_terms):
            power = Q if power is None else power @ Q
            R = R + c * power
        return R[0]

    return other_core(made)


def _cut(terms: int) -> list[float]:
    return [2.0, 1.0] if terms == 3 else coefficients(terms)


def _held(method: Any, p: Any) -> Array:
    """The projection without a gradient."""
    if not method.psoft_orth:
        return p.C
    q = p.q * held(method._shortened(p.q) / p.q)
    return _of(method, skew(q.reshape(1, -1), method.r))


def _negative(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    return -v if key == "psoft_R.weight" and config["psoft_orth"] else v


def _config(**changes: Any) -> Replay:
    return as_if(lambda case: with_config(case, lambda config: {**config, **changes}))


def _longer(config: dict[str, Any]) -> dict[str, Any]:
    eps = config["cayley_neumann_eps"]
    return config if eps is None else {**config, "cayley_neumann_eps": eps * math.sqrt(2)}


def _swapped(C: Array, p: Any) -> Array:
    C = C if p.v_a is None else column(p.v_a) * C
    return (C if p.v_b is None else C * p.v_b) - np.eye(C.shape[0])


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    one = constant(1.0, "init-not-identity")
    found = {f"psoft_R.vector_{x}": one for x in "ab" if config[f"psoft_mag_{x}"]}
    if config["psoft_orth"]:
        found["psoft_R.weight"] = constant(0.0, "init-not-identity") if config["init_weights"] else normal(0.1)
    return found


def best_part(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """s B A is the best part of W of rank r, A or both halves as ab_svd_init says, whatever the signs."""
    assert case.weight is not None
    config = case.adapters[0].config
    A, B, scale = draw["_psoft_A_cache"], draw["_psoft_B_cache"], config["psoft_alpha"] / config["r"]
    U, S, V = np.linalg.svd(layer.fold(case.weight), full_matrices=False)
    r = config["r"]
    u = (r + 4) * 2.0 ** -PRECISION[dtype]  # A and B are rounded once; HF works them out in float32
    product, size = scale * (B @ A), scale * (np.abs(B) @ np.abs(A))
    if np.any(np.abs(product - (U[:, :r] * S[:r]) @ V[:r]) > u * size + 400 * 2.0**-24 * S[0]):
        return "init-wrong-part: s B A must be the part of the weight with its largest singular values"
    of_A = np.eye(r) if config["ab_svd_init"] == "psoft_init" else np.diag(S[:r] / scale)
    if np.any(np.abs(A @ A.T - of_A) > u * (np.abs(A) @ np.abs(A.T)) + 400 * 2.0**-24 * np.max(of_A)):
        return f"init-wrong-halves: with {config['ab_svd_init']} A A^T is not what A B are made of"
    if not config["psoft_orth"] and config["init_weights"] and np.any(draw["psoft_R.weight"] != np.eye(r)):
        return "init-not-identity: a free R must start at I"
    return ""


FRESH = Fresh(
    clause="PSOFT-C19",
    starts={
        "default": Start(SOLVED, draws=1),
        "pissa": Start({**SOLVED, "ab_svd_init": "pissa_init"}, draws=1),
        "free": Start(FREE, draws=1),
        "false": Start({**SOLVED, "init_weights": False}),
    },
    laws=laws,
    identity=best_part,
)
WORDS = ("psoft_orth", "psoft_mag_a", "psoft_mag_b", "use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps")
FILES = Files(
    configs_clause="PSOFT-C21",
    keys_clause="PSOFT-C22",
    configs={
        "plain": {"r": 4, "psoft_alpha": 6},
        "missing": {},
        "alpha-missing": {"r": 4},
        "free": {"r": 4, "psoft_orth": False, "psoft_mag_a": False},
        "series": {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 3, "cayley_neumann_eps": 0.5},
    },
    told={"r": "r", "scaling": "scale", **{word: word for word in WORDS}},
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="scale-is-alpha",
            clause="PSOFT-C2",
            sentence="the scale is alpha instead of alpha / r",
            replay=with_scale(lambda alpha, r, rslora: alpha, "psoft_alpha"),
        ),
        Mistake(
            name="scale-is-one",
            clause="PSOFT-C2",
            sentence="alpha is ignored: B (R - I) A is added unscaled",
            replay=with_scale(lambda alpha, r, rslora: 1.0, "psoft_alpha"),
        ),
        Mistake(
            name="identity-not-subtracted",
            clause="PSOFT-C1",
            sentence="B R A is added, with what B A already stands for in the frozen weight",
            replay=delta(turn=scaled),
        ),
        Mistake(
            name="identity-turned-too",
            clause="PSOFT-C8",
            sentence="the scales are multiplied to C - I instead of to C",
            replay=delta(turn=lambda C, p: scaled(C - np.eye(C.shape[0]), p)),
        ),
        Mistake(
            name="scales-swapped",
            clause="PSOFT-C8",
            sentence="vector_a scales the rows of C and vector_b its columns",
            replay=delta(turn=_swapped),
        ),
        Mistake(
            name="R-transposed",
            clause="PSOFT-C3",
            sentence="R is transposed: x A^T R instead of x A^T R^T",
            replay=delta(turn=lambda C, p: scaled(C, p).T - np.eye(C.shape[0])),
        ),
        Mistake(
            name="turned-backwards",
            clause="PSOFT-C4",
            sentence="C is (I - Q) (I + Q)^-1, as OFT's is without its series",
            replay=as_if_tensors(_negative),
        ),
        Mistake(
            name="triangle-alone",
            clause="PSOFT-C4",
            sentence="Q is the upper triangle alone, without minus its transposed",
            replay=where(orthogonal, delta(other_core(_triangle))),
        ),
        Mistake(
            name="triangle-by-columns",
            clause="PSOFT-C4",
            sentence="the upper triangle is filled column by column instead of row by row",
            replay=where(orthogonal, delta(other_core(_by_columns))),
        ),
        Mistake(
            name="neumann-ignored",
            clause="PSOFT-C5",
            sentence="use_cayley_neumann is not read: (I + Q) (I - Q)^-1 is solved for",
            replay=where(series, _config(use_cayley_neumann=False)),
        ),
        Mistake(
            name="neumann-last-doubled",
            clause="PSOFT-C5",
            sentence="the last power of the series has the factor 2 instead of 1",
            replay=where(series, delta(_series(lambda t: [2.0] * len(coefficients(t))))),
        ),
        Mistake(
            name="neumann-not-doubled",
            clause="PSOFT-C5",
            sentence="the powers of the series have the factor 1: that is (I - Q)^-1",
            replay=where(series, delta(_series(lambda t: [1.0] * len(coefficients(t))))),
        ),
        Mistake(
            name="three-terms-cut",
            clause="PSOFT-C5",
            sentence="three terms end with Q^2, where HF adds Q^3 as for four",
            replay=where(lambda c: series(c) and c["num_cayley_neumann_terms"] == 3, delta(_series(_cut))),
        ),
        Mistake(
            name="terms-ignored",
            clause="PSOFT-C5",
            sentence="num_cayley_neumann_terms is not read: there are always five",
            replay=where(series, _config(num_cayley_neumann_terms=5)),
        ),
        Mistake(
            name="eps-ignored",
            clause="PSOFT-C6",
            sentence="cayley_neumann_eps is not read",
            replay=where(shortened, _config(cayley_neumann_eps=None)),
        ),
        Mistake(
            name="norm-of-the-numbers",
            clause="PSOFT-C6",
            sentence="the norm is that of the stored numbers, not that of Q, in which each of them stands twice",
            replay=where(lambda c: shortened(c) and c["cayley_neumann_eps"] < 0.7, as_if(lambda case: with_config(case, _longer))),
        ),
        Mistake(
            name="grad-not-through-eps",
            clause="PSOFT-C17",
            sentence="the norm that cayley_neumann_eps divides by is held constant in the gradient",
            replay=where(shortened, parameter_gradients(delta(_held))),
        ),
        only_first_adapter("PSOFT-C10"),
        *dropout("PSOFT-C11"),
        *merging("PSOFT-C12", "PSOFT-C13"),
        input_gradient_missing("PSOFT-C18"),
    ),
)
