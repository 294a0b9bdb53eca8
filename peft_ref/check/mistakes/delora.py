"""DeLoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_ref.arrays import Array, column, row_norm
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Case, NDArray
from peft_ref.check.distributions import Law, constant, uniform
from peft_ref.check.dyadic_vectors import whole_norms
from peft_ref.check.mistake import Mistake, Suite, as_if_tensors, gradients_times, reread
from peft_ref.check.shared_mistakes import (
    dropout,
    input_gradient_missing,
    merging,
    only_first_adapter,
    other_delta,
    parameter_gradients,
)
from peft_ref.check.tape import constant as held
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import RUN, Variant, gains
from peft_ref.layers import Layer

PLAIN = {"r": 4, "delora_lambda": 6}
THREE = {"r": 3, "delora_lambda": 5}


def unit_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return whole_norms(rng, shape[::-1]).T


def lengths(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return rng.choice([3.0, 6.0, 10.0, 12.0], shape)


# Norms that are powers of two, so that nothing rounds.
EXACT: Mapping[str, Any] = {"A": unit_rows, "B": whole_norms, "length": lengths, "w": gains}
ANY: Mapping[str, Any] = {"length": lengths, "w": gains}


def one_is_short(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """The first length is far below 1e-4."""
    v = unit_rows(rng, shape)
    v[0] /= 2.0**20
    return v


# The lengths that are held are as short as the steps of a difference.
WITHOUT_GRADIENT = ("forward", "merge", "unmerge")

VARIANTS = (
    Variant(name="plain", clause="DELORA-C1", configs=(PLAIN,), draws=EXACT),
    Variant(name="any-norm", clause="DELORA-C3", configs=(PLAIN,), draws=ANY),
    Variant(name="rounded", clause="DELORA-C2", configs=(THREE,), layers=("linear-large",), numbers="rounded", draws=ANY),
    Variant(name="short", clause="DELORA-C4", configs=(PLAIN,), operations=WITHOUT_GRADIENT, draws={**EXACT, "A": one_is_short}),
    Variant(name="vector", clause="DELORA-C1", configs=(PLAIN,), operations=RUN, rows=(), draws=EXACT),
    Variant(name="no-bias", clause="DELORA-C1", configs=(PLAIN,), bias=False, draws=EXACT),
    Variant(name="dropout", clause="DELORA-C9", configs=(PLAIN,), operations=RUN, dropout=0.25, draws=EXACT),
    Variant(name="two-adapters", clause="DELORA-C8", configs=(PLAIN, {"r": 2, "delora_lambda": 10}), draws=EXACT),
)

Norm = Callable[[Array], Array]


def at_least(norm: Array) -> Array:
    return np.where(norm >= 1e-4, norm, norm * 0.0 + 1e-4)


def row_lengths(V: Array) -> Array:
    return at_least(row_norm(V))


def whole(V: Array) -> Array:
    return np.sqrt((V * V).sum())


def delta(of_A: Norm = row_lengths, of_B: Norm = row_lengths, weigh: Callable[[Any, Array], Array] | None = None) -> Any:
    """A delta with other lengths, given A's rows and B's columns as rows, or with other weights of its columns and rows."""

    def made(layer: Layer, method: Any, p: Any, W0: Array) -> Array:
        c = p.length / method.r / (of_A(p.A) * of_B(p.B.T))
        low = (p.B * c) @ p.A
        return low * p.w if weigh is None else low * weigh(p, W0)

    return other_delta(made)


def times(key_part: str, factor: Callable[[Mapping[str, Any]], float]) -> Callable[[str, NDArray, Mapping[str, Any]], NDArray]:
    return lambda key, v, config: v * factor(config) if key_part in key else v


def _one(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
    return np.ones(v.shape) if key == "delora_lambda" else v


def _none(key: str, g: NDArray, config: Mapping[str, Any]) -> NDArray:
    return np.zeros(g.shape) if key == "delora_lambda" else g


def _row_weights(p: Any, W0: Array) -> Array:
    return column(row_norm(W0))


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    into = 1 / math.sqrt(layer.shape[1])
    B = constant(0.0, "init-not-identity") if config["init_weights"] else uniform(1 / math.sqrt(config["r"]))
    return {"delora_A": uniform(into), "delora_B": B, "delora_lambda": constant(config["delora_lambda"], "init-lambda")}


def norms(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    assert case.weight is not None
    want = np.linalg.norm(layer.fold(case.weight), axis=0)
    if np.max(np.abs(draw["delora_w_norm"] - want)) <= 2 * len(case.weight) * 2.0 ** -PRECISION[dtype] * np.max(want):
        return ""
    return "init-wrong-norm: delora_w_norm must be the norms of the frozen weight's columns"


FRESH = Fresh(
    clause="DELORA-C16",
    starts={"default": Start(PLAIN), "false": Start({**PLAIN, "init_weights": False})},
    laws=laws,
    identity=norms,
)
FILES = Files(
    configs_clause="DELORA-C18",
    keys_clause="DELORA-C19",
    configs={
        "plain": {"r": 4, "delora_lambda": 6},
        "missing": {},
        "rank-pattern": {"r": 4, "rank_pattern": {"v_proj": 16}},
        "lambda-pattern": {"r": 4, "delora_lambda": 6, "lambda_pattern": {"v_proj": 20, r"layers\.1\..*": 3.5}},
    },
    told={"r": "r", "delora_lambda": "delora_lambda"},
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="lambda-not-divided",
            clause="DELORA-C2",
            sentence="lambda is not divided by r",
            replay=as_if_tensors(times("lambda", lambda config: config["r"])),
        ),
        Mistake(
            name="lambda-ignored",
            clause="DELORA-C2",
            sentence="lambda is not read: every outer product has the length 1 / r",
            replay=as_if_tensors(_one, _none),
        ),
        Mistake(
            name="not-normalised",
            clause="DELORA-C3",
            sentence="A and B are not divided by their lengths",
            replay=delta(lambda V: row_norm(V) * 0.0 + 1.0, lambda V: row_norm(V) * 0.0 + 1.0),
        ),
        Mistake(
            name="A-not-normalised",
            clause="DELORA-C3",
            sentence="A is not divided by its rows' lengths",
            replay=delta(of_A=lambda V: row_norm(V) * 0.0 + 1.0),
        ),
        Mistake(
            name="B-not-normalised",
            clause="DELORA-C3",
            sentence="B is not divided by its columns' lengths",
            replay=delta(of_B=lambda V: row_norm(V) * 0.0 + 1.0),
        ),
        Mistake(
            name="frobenius-norms",
            clause="DELORA-C3",
            sentence="A and B are each divided by one length, that of the whole matrix",
            replay=delta(whole, whole),
        ),
        Mistake(
            name="norms-squared",
            clause="DELORA-C3",
            sentence="A and B are divided by the squares of their lengths",
            replay=delta(lambda V: row_lengths(V) * row_lengths(V), lambda V: row_lengths(V) * row_lengths(V)),
        ),
        Mistake(
            name="short-not-held",
            clause="DELORA-C4",
            sentence="lengths below 1e-4 are divided by as they are",
            replay=delta(row_norm, row_norm),
        ),
        Mistake(
            name="norm-ignored",
            clause="DELORA-C5",
            sentence="the delta is not weighed by the norms of the frozen weight's columns",
            replay=delta(weigh=lambda p, W0: p.w * 0.0 + 1.0),
        ),
        Mistake(
            name="norm-of-now",
            clause="DELORA-C6",
            sentence="the norms are those of the weight as it is now, not those saved with the adapter",
            replay=delta(weigh=lambda p, W0: row_norm(W0.T)),
        ),
        Mistake(
            name="norm-of-rows",
            clause="DELORA-C5",
            sentence="rows are weighed, by the norms of the frozen weight's rows, instead of columns",
            replay=delta(weigh=_row_weights),
        ),
        Mistake(
            name="norm-of-all",
            clause="DELORA-C5",
            sentence="the delta is weighed by one norm, that of the whole frozen weight, as in the paper",
            replay=delta(weigh=lambda p, W0: whole(W0)),
        ),
        Mistake(
            name="A-transposed",
            clause="DELORA-C7",
            sentence="delora_A's numbers are read as (in, r) instead of (r, in)",
            replay=reread("_A"),
        ),
        Mistake(
            name="B-transposed",
            clause="DELORA-C7",
            sentence="delora_B's numbers are read as (r, out) instead of (out, r)",
            replay=reread("_B"),
        ),
        Mistake(
            name="grad-norms-held",
            clause="DELORA-C14",
            sentence="the lengths of A and B are held constant in the gradient",
            replay=parameter_gradients(delta(lambda V: held(row_lengths(V)), lambda V: held(row_lengths(V)))),
        ),
        Mistake(
            name="grad-lambda-not-divided",
            clause="DELORA-C13",
            sentence="the gradient of lambda is not divided by r",
            replay=gradients_times(lambda config: config["r"], "lambda"),
        ),
        only_first_adapter("DELORA-C8"),
        *dropout("DELORA-C9"),
        *merging("DELORA-C11", "DELORA-C12"),
        input_gradient_missing("DELORA-C15"),
    ),
)
