"""AdaMSS: what is asked about its layers, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, constant
from peft_ref.check.mistake import Formula, Mistake, Replay, Suite, only, reread, stored
from peft_ref.check.oracle import Problem, answer, pose
from peft_ref.check.shared_mistakes import input_gradient_missing, merging, only_first_adapter
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import RUN, Variant
from peft_ref.contracts import Delta
from peft_ref.layers import Layer
from peft_ref.methods.adamss import AdaMSS

PLAIN = {"r": 4, "num_subspaces": 3, "subspace_rank": 2, "clusters": [0, 2, 1, 0, 2, 0, 1]}
TWO = {"r": 3, "num_subspaces": 2, "subspace_rank": 1, "clusters": [1, 1, 0, 1, 0, 0, 1]}
LARGE = {"r": 5, "num_subspaces": 2, "subspace_rank": 2, "clusters": [0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0]}

VARIANTS = (
    Variant(name="plain", clause="ADAMSS-C1", configs=(PLAIN,)),
    Variant(name="one-each", clause="ADAMSS-C4", configs=(TWO,)),
    Variant(name="small", clause="ADAMSS-C1", configs=(PLAIN,), numbers="small"),
    Variant(name="rounded", clause="ADAMSS-C1", configs=(LARGE,), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="ADAMSS-C1", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="ADAMSS-C3", configs=(PLAIN,), bias=False),
    Variant(name="two-adapters", clause="ADAMSS-C10", configs=(PLAIN, TWO)),
)

Whole = Callable[[AdaMSS, Layer, Any], tuple[Array, Array | None]]


def parts(method: AdaMSS, layer: Layer, p: Any, shift: int = 0) -> list[Array]:
    """B_i A_i N of every subspace; with A of the one `shift` further on."""
    count = len(method.rows(layer))
    return [getattr(p, f"B{i}") @ (getattr(p, f"A{(i + shift) % count}") @ p.N) for i in range(count)]


def scattered(method: AdaMSS, layer: Layer, found: list[Array]) -> Array:
    order = [row for own in method.rows(layer) for row in own]
    return np.concatenate(found)[np.argsort(order)]


def split(layer: Layer, whole: Array) -> tuple[Array, Array | None]:
    return (whole[:, :-1], whole[:, -1]) if layer.bias else (whole, None)


def right(method: AdaMSS, layer: Layer, p: Any) -> tuple[Array, Array | None]:
    return split(layer, scattered(method, layer, parts(method, layer, p)))


def changing(change: Whole) -> Formula:
    """Another dW and db."""

    def total(p: Problem, W: Array, b: Array | None, sign: float) -> tuple[Array, Array | None]:
        for a in p.adapters:
            assert isinstance(a.method, AdaMSS)
            dW, db = change(a.method, p.layer, a.params)
            W, b = W + sign * dW, b if b is None or db is None else b + sign * db
        return W, b

    return Formula(weight=lambda p: total(p, p.W, p.b, 1.0), unmerge=lambda p: total(p, p.merged_W, p.merged_b, -1.0))


def delta(change: Whole, biased: bool = False) -> Replay:
    """The same for every operation; None where it needs a bias to show."""
    formula = changing(change)

    def replay(case: Case) -> Answer | None:
        if biased and case.bias is None:
            return None
        if case.operation != "delta":
            return formula(case)
        p = pose(case)
        method: Any = p.adapters[0].method
        return stored(p.layer, change(method, p.layer, p.adapters[0].params)[0], None)

    return replay


def _first_alone(method: AdaMSS, layer: Layer, p: Any) -> tuple[Array, Array | None]:
    found = parts(method, layer, p)
    return split(layer, scattered(method, layer, [found[0], *(part * 0.0 for part in found[1:])]))


def _bias_first(method: AdaMSS, layer: Layer, p: Any) -> tuple[Array, Array | None]:
    whole = scattered(method, layer, parts(method, layer, p))
    return whole[:, 1:], whole[:, 0]


def _gathered(method: AdaMSS, layer: Layer, p: Any) -> tuple[Array, Array | None]:
    order = [row for own in method.rows(layer) for row in own]
    return split(layer, np.concatenate(parts(method, layer, p))[order])


def _without_bias(case: Case) -> Answer | None:
    if case.bias is None:
        return None
    given = case.bias if case.operation == "merge" else case.merged_bias
    return {**answer(case), "bias": np.asarray(given, dtype=np.float64)}


def _bias_gradient_missing(case: Case) -> Answer | None:
    """What the bias column of N gives to A and B is left out of their gradients."""
    if case.bias is None:
        return None
    p = pose(case)
    out = {"x": answer(case)["x"]}
    for i, a in enumerate(p.adapters):
        assert isinstance(a.method, AdaMSS)
        d = a.method.delta_vjp(p.layer, a.params, Delta(p.layer.weight_vjp(p.x, p.dy)))
        out |= {f"{i}.{key}": value for key, value in a.method.pack(p.layer, d).items()}
    return out


def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
    method = AdaMSS(**{k: v for k, v in config.items() if k != "peft_type"})
    return {s.key: constant(0.0, "init-not-identity") for s in method.spec(layer) if s.field.startswith("B")}


def orthonormal(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    for key, value in draw.items():
        if "adamss_B" not in key and key != "weight":
            far = float(np.max(np.abs(value @ value.T - np.eye(value.shape[0]))))
            if far > 64 * 2.0 ** -PRECISION[dtype]:
                return f"init-not-orthonormal: the rows of {key} must be orthonormal, and their products are off by {far:.3g}"
    return ""


FRESH = Fresh(clause="ADAMSS-C17", starts={"default": Start(PLAIN, draws=1)}, laws=laws, identity=orthonormal)
FILES = Files(
    configs_clause="ADAMSS-C18",
    keys_clause="ADAMSS-C19",
    configs={"plain": {"r": 4, "num_subspaces": 3}, "rank-missing": {}, "more": {"r": 4, "num_subspaces": 2, "subspace_rank": 2}},
    told={"num_subspaces": "num_subspaces"},
)


def _mistake(name: str, clause: str, sentence: str, replay: Replay) -> Mistake:
    return Mistake(name=name, clause=clause, sentence=sentence, replay=replay)


SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        _mistake(
            "rows-not-scattered",
            "ADAMSS-C2",
            "the rows of the subspaces are left one after the other, not put where they belong",
            delta(lambda m, layer, p: split(layer, np.concatenate(parts(m, layer, p)))),
        ),
        _mistake(
            "rows-gathered",
            "ADAMSS-C2",
            "the list of rows is read the other way: as which row comes where, not where each row goes",
            delta(_gathered),
        ),
        _mistake("first-subspace-alone", "ADAMSS-C1", "only the first subspace acts", delta(_first_alone)),
        _mistake(
            "factors-of-neighbours",
            "ADAMSS-C1",
            "B of one subspace meets A of the next one",
            delta(lambda m, layer, p: split(layer, scattered(m, layer, parts(m, layer, p, 1)))),
        ),
        _mistake(
            "bias-ignored",
            "ADAMSS-C3",
            "the last column of N is left out: the bias stays as it is",
            delta(lambda m, layer, p: (right(m, layer, p)[0], None), biased=True),
        ),
        _mistake(
            "bias-column-first",
            "ADAMSS-C3",
            "the first column of N is taken for that of the bias",
            delta(lambda m, layer, p: _bias_first(m, layer, p) if layer.bias else right(m, layer, p), biased=True),
        ),
        _mistake("a-transposed", "ADAMSS-C6", "the numbers of A are read as (r, r_i) instead of (r_i, r)", reread("adamss_A")),
        _mistake("b-transposed", "ADAMSS-C6", "the numbers of B are read as (r_i, n_i) instead of (n_i, r_i)", reread("adamss_B")),
        only_first_adapter("ADAMSS-C10"),
        *merging("ADAMSS-C12", "ADAMSS-C13"),
        _mistake("merge-without-bias", "ADAMSS-C12", "merging leaves the bias as it is", only(merge=_without_bias)),
        _mistake("unmerge-without-bias", "ADAMSS-C13", "unmerging leaves the bias as it is", only(unmerge=_without_bias)),
        _mistake(
            "grad-without-bias",
            "ADAMSS-C15",
            "the gradients of A and B lack what comes from the bias",
            only(backward=_bias_gradient_missing),
        ),
        input_gradient_missing("ADAMSS-C16"),
    ),
)
