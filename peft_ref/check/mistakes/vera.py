"""VeRA: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array, column, namespace
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray, build_method
from peft_ref.check.distributions import Law, constant
from peft_ref.check.mistake import Mistake, Replay, Suite, as_if_tensors, only, reread
from peft_ref.check.oracle import answer
from peft_ref.check.shared_mistakes import dropout, merging, only_first_adapter, other_delta
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.vera import projections

PLAIN = {"r": 4, "widest_in": 8, "widest_out": 9}
ALONE = {"r": 4, "widest_in": 5, "widest_out": 7}
LARGE = {"r": 9, "widest_in": 14, "widest_out": 13}


def variants(page: str, dropout: str) -> tuple[Variant, ...]:
    return (
        Variant(name="plain", clause=f"{page}-C1", configs=(PLAIN,), layers=("linear", "transposed_linear")),
        Variant(name="small", clause=f"{page}-C1", configs=(PLAIN,), numbers="small"),
        Variant(name="alone", clause=f"{page}-C3", configs=(ALONE,)),
        Variant(name="rounded", clause=f"{page}-C1", configs=(LARGE,), layers=("linear-large",), numbers="rounded"),
        Variant(name="vector", clause=f"{page}-C1", configs=(PLAIN,), operations=RUN, rows=()),
        Variant(name="no-bias", clause=f"{page}-C2", configs=(PLAIN,), bias=False),
        Variant(name="dropout", clause=f"{page}-C17", configs=({**PLAIN, dropout: 0.75},), dropout=0.75, operations=RUN),
        Variant(name="two-adapters", clause=f"{page}-C7", configs=(PLAIN, {**PLAIN, "r": 2})),
    )


Product = Callable[[Layer, Any], Array]


def delta(layer: Layer, p: Any) -> Array:
    """The right one, of whatever parameters."""
    out, n_in = layer.shape
    return (column(p.b) * p.B[:out, :]) @ (column(p.d) * p.A[:, :n_in])


def random_pair(page: str, prefix: str, delta: Product, rows: int) -> tuple[Mistake, ...]:
    """What goes wrong with two vectors and two random matrices, on a page with the numbers of VeRA's; A has `rows` times r rows."""

    def wrong(change: Callable[[Layer, Any], Any]) -> Replay:
        """With other parameters, None where they would be the same."""

        def replayed(layer: Layer, method: Any, p: Any, W0: Array) -> Array | None:
            changed = change(layer, p)
            return None if changed is None else delta(layer, changed)

        return other_delta(replayed)

    def last(layer: Layer, p: Any) -> Any:
        out, n_in = layer.shape
        if p.A.shape[1] == n_in and p.B.shape[0] == out:
            return None
        return p._replace(A=p.A[:, p.A.shape[1] - n_in :], B=p.B[p.B.shape[0] - out :, :])

    def refilled(layer: Layer, p: Any) -> Any:
        """The first numbers of A as a matrix of the layer's own width."""
        xp, (_, n_in), r = namespace(p.A), layer.shape, p.A.shape[0]
        return None if p.A.shape[1] == n_in else p._replace(A=xp.reshape(xp.reshape(p.A, (-1,))[: r * n_in], (r, n_in)))

    def drawn_again(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
        if key not in (f"{prefix}_A", f"{prefix}_B"):
            return v
        A, B = projections(0, rows * config["r"], config["r"], config["widest_in"], config["widest_out"])
        return np.asarray(A if key == f"{prefix}_A" else B, dtype=np.float64)

    def gradient_without(asked: str, other: str) -> Replay:
        def backward(case: Case) -> Answer:
            """The gradient of `asked` as if all numbers of `other` were one."""
            ones = (replace(a, tensors={k: np.ones_like(v) if k == other else v for k, v in a.tensors.items()}) for a in case.adapters)
            without = answer(replace(case, adapters=tuple(ones)))
            return {name: without[name] if name.endswith(asked) else g for name, g in answer(case).items()}

        return only(backward=backward)

    b, d = f"{prefix}_lambda_b", f"{prefix}_lambda_d"
    return (
        Mistake(
            name="last-rows-and-columns",
            clause=f"{page}-C3",
            sentence="a narrow layer is given the last columns of A and the last rows of B instead of the first",
            replay=wrong(last),
        ),
        Mistake(
            name="matrix-refilled",
            clause=f"{page}-C3",
            sentence="the first numbers of A are laid out anew as (its rows, in) instead of cutting its columns off",
            replay=wrong(refilled),
        ),
        Mistake(
            name="scale-is-one-over-r",
            clause=f"{page}-C4",
            sentence="the product is divided by r, as LoRA's is",
            replay=other_delta(lambda layer, method, p, W0: delta(layer, p) / method.r),
        ),
        Mistake(
            name="b-ignored",
            clause=f"{page}-C1",
            sentence="the vector b is left out",
            replay=wrong(lambda layer, p: p._replace(b=p.b * 0 + 1.0)),
        ),
        Mistake(
            name="d-ignored",
            clause=f"{page}-C1",
            sentence="the vector d is left out",
            replay=wrong(lambda layer, p: p._replace(d=p.d * 0 + 1.0)),
        ),
        Mistake(
            name="d-on-both",
            clause=f"{page}-C1",
            sentence="d scales the columns of B and the rows of A, so that it counts twice",
            replay=wrong(lambda layer, p: p._replace(d=p.d * p.d)),
        ),
        Mistake(
            name="b-on-the-frozen-too",
            clause=f"{page}-C1",
            sentence="b scales the frozen layer's output too, as one vector on the sum",
            replay=other_delta(lambda layer, method, p, W0: column(p.b) * W0 - W0 + delta(layer, p)),
        ),
        Mistake(
            name="A-reread",
            clause=f"{page}-C5",
            sentence=f"the numbers of {prefix}_A are read in the order of its transpose",
            replay=reread(f"{prefix}_A"),
        ),
        Mistake(
            name="B-reread",
            clause=f"{page}-C5",
            sentence=f"the numbers of {prefix}_B are read in the order of its transpose",
            replay=reread(f"{prefix}_B"),
        ),
        Mistake(
            name="drawn-again",
            clause=f"{page}-C6",
            sentence="A and B are drawn from the seed although the file holds them",
            replay=as_if_tensors(drawn_again, lambda key, g, config: g),
        ),
        Mistake(name="grad-b-without-d", clause=f"{page}-C10", sentence="the gradient of b lacks d", replay=gradient_without(b, d)),
        Mistake(name="grad-d-without-b", clause=f"{page}-C11", sentence="the gradient of d lacks b", replay=gradient_without(d, b)),
        only_first_adapter(f"{page}-C7"),
        *merging(f"{page}-C8", f"{page}-C9"),
        *dropout(f"{page}-C17"),
    )


def as_drawn(prefix: str, rows: int) -> Callable[[Case, Layer, Draw, str], str]:
    """The seed decides A and B: to the bit in float32, rounded once where the format is narrower."""

    def identity(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
        method: Any = build_method(case.method, case.adapters[0].config)
        letters = method.dims(layer)
        drawn = projections(method.projection_prng_key, rows * method.r, method.r, letters["widest_in"], letters["widest_out"])
        for key, right in zip((f"{prefix}_A", f"{prefix}_B"), drawn, strict=True):
            if not np.all(np.abs(draw[key] - right) <= 2.0 ** -min(PRECISION[dtype], 23) * np.abs(right)):
                return f"{key}: init-other-matrices: not what torch draws from projection_prng_key={method.projection_prng_key}"
        return ""

    return identity


def starts(prefix: str) -> Callable[[Config, Layer], Mapping[str, Law]]:
    def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
        b, d = constant(0.0, "init-not-identity"), constant(config["d_initial"], "init-not-d-initial")
        return {f"{prefix}_lambda_b": b, f"{prefix}_lambda_d": d}

    return laws


FRESH = {
    "default": Start({"r": 4, "d_initial": 0.125}, ("linear", "transposed_linear"), 1),
    "wide": Start({**PLAIN, "d_initial": 0.25, "projection_prng_key": 7}, draws=1),
}
CONFIGS: dict[str, Config] = {
    "plain": {"r": 4, "save_projection": True},
    "default": {},
    "other-seed": {"r": 8, "projection_prng_key": 5, "d_initial": 0.25},
}

SUITE = Suite(
    variants=variants("VERA", "vera_dropout"),
    mistakes=random_pair("VERA", "vera", delta, 1),
    fresh=Fresh(clause="VERA-C12", starts=FRESH, laws=starts("vera"), identity=as_drawn("vera", 1)),
    files=Files(configs_clause="VERA-C14", keys_clause="VERA-C15", configs=CONFIGS, told={"r": "r"}),
)
