"""FRoD: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.arrays import Array, namespace, scattered
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray, build_method
from peft_ref.check.distributions import Law, constant, normal
from peft_ref.check.mistake import Formula, Mistake, Replay, Suite, as_if, only, reread, stored
from peft_ref.check.oracle import Problem, answer, pose
from peft_ref.check.shared_mistakes import dropout, input_gradient_missing, merging, only_first_adapter, other_delta
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer
from peft_ref.methods.frod_basis import in_basis, places, solved

PLAIN = {"sparse_rate": 0.2}
LARGE = {"sparse_rate": 0.1}

VARIANTS = (
    Variant(name="plain", clause="FROD-C1", configs=(PLAIN,), layers=("linear", "transposed_linear")),
    Variant(name="small", clause="FROD-C1", configs=(PLAIN,), numbers="small"),
    Variant(name="one-place", clause="FROD-C2", configs=({},)),
    Variant(name="diagonal", clause="FROD-C2", configs=({"sparse_rate": 0.0},)),
    Variant(name="wide", clause="FROD-C1", configs=(PLAIN,), layers=("linear-blocks",)),
    Variant(name="rounded", clause="FROD-C1", configs=(LARGE,), layers=("linear-large",), numbers="rounded"),
    Variant(name="vector", clause="FROD-C1", configs=(PLAIN,), operations=RUN, rows=()),
    Variant(name="no-bias", clause="FROD-C4", configs=(PLAIN,), bias=False),
    Variant(name="dropout", clause="FROD-C20", configs=({**PLAIN, "frod_dropout": 0.75},), dropout=0.75, operations=RUN),
    Variant(name="two-adapters", clause="FROD-C8", configs=(PLAIN, {"sparse_rate": 0.3})),
)


def sparse(p: Any, turned: bool = False, start: int = 0) -> Array:
    """S (in, in), with rows and columns exchanged, or counted from another number."""
    n = p.L.shape[0]
    row, column = (p.places[1 if turned else 0] - start) % n, (p.places[0 if turned else 1] - start) % n
    if not p.s.shape[0]:
        return p.V * 0.0
    return namespace(p.s).reshape(scattered(p.s, row * n + column, n * n), (n, n))


def _in_basis(weight: Callable[[Any, Array, Array], Array | None]) -> Replay:
    """Another W', given the parameters, S and diag(L); None where it is the right one."""

    def delta(layer: Layer, method: Any, p: Any, W0: Array) -> Array | None:
        wrong = weight(p, sparse(p), np.eye(p.L.shape[0]) * p.L)
        return None if wrong is None else wrong - W0

    return other_delta(delta)


def whole(p: Any, M: Array) -> Array:
    return p.U @ M @ p.V.T


def _if_sparse(p: Any, M: Array) -> Array | None:
    return whole(p, M) if p.s.shape[0] else None


def _added(layer: Layer, method: Any, p: Any, W0: Array) -> Array:
    return whole(p, sparse(p) + np.eye(p.L.shape[0]) * p.L)


def _last_alone(p: Problem) -> Array:
    return whole(p.adapters[-1].params, sparse(p.adapters[-1].params) + np.eye(p.W.shape[1]) * p.adapters[-1].params.L)


def _several(replay: Replay) -> Replay:
    return lambda case: replay(case) if len(case.adapters) > 1 else None


def _worked_out(change: Callable[[NDArray, NDArray], NDArray]) -> Replay:
    """Another U, made of the frozen weight and V."""

    def other(case: Case) -> Case:
        assert case.weight is not None
        assert case.layer is not None
        W = case.layer.fold(case.weight)
        made = [{**a.tensors, "frod_U": change(W, a.tensors["frod_V"])} for a in case.adapters]
        return replace(case, adapters=tuple(replace(a, tensors=t) for a, t in zip(case.adapters, made, strict=True)))

    return as_if(other)


def _drawn_again(case: Case) -> Case | None:
    """The places of the configuration's seed."""
    assert case.layer is not None
    n, drawn = case.layer.shape[1], []
    for a in case.adapters:
        count = a.tensors["frod_s_indices"].shape[1]
        drawn.append({**a.tensors, "frod_s_indices": places({"": n}, {"": count}, a.config["projection_prng_key"])[""]})
    if all(not t["frod_s_indices"].size for t in drawn):
        return None
    return replace(case, adapters=tuple(replace(a, tensors=t) for a, t in zip(case.adapters, drawn, strict=True)))


def _gradients(**other: Callable[[Any, NDArray], NDArray]) -> Replay:
    """Other gradients of L or s, given the parameters and G, where one adapter has no dropout."""
    keys = {"L": "0.frod_lambda_l", "s": "0.frod_lambda_s_values"}

    def backward(case: Case) -> Answer | None:
        if len(case.adapters) != 1 or case.adapters[0].dropout:
            return None
        p = pose(case)
        params, G = p.adapters[0].params, p.layer.weight_vjp(p.x, p.dy)
        return {**answer(case), **{keys[field]: made(params, G) for field, made in other.items()}}

    return only(backward=backward)


def _at(M: NDArray, places: NDArray) -> NDArray:
    return np.asarray(M[places[0], places[1]])


def _saved_copy(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, p.W, p.merged_b)


def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
    on = config.get("init_weights", True)
    return {"frod_lambda_s_values": constant(0.0, "init-not-identity") if on else normal(0.1)}


def as_worked_out(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """The places to the number; V of the weight, whatever the choice of singular vectors; U and L of both."""
    assert case.weight is not None
    method: Any = build_method("frod", case.adapters[0].config)
    W, n = layer.fold(case.weight), layer.shape[1]
    want = places({"": n}, {"": method.dims(layer)["nnz"]}, method.projection_prng_key)[""]
    if not np.array_equal(draw["frod_s_indices"], want):
        return f"frod_s_indices: init-other-places: not what torch draws from projection_prng_key={method.projection_prng_key}"
    if not np.array_equal(draw["frod_s_size"], [n, n]):
        return f"frod_s_size: init-other-size: it is [{n}, {n}]"
    V, U, L = draw["frod_V"], draw["frod_U"], draw["frod_lambda_l"]
    near = (n + 4) * 2.0 ** -PRECISION[dtype]  # what is stored is rounded once; HF works V out in float32
    product, right = (V @ V.T, W.T @ W) if W.shape[0] >= n else (V.T @ V, np.eye(n))
    size = np.abs(V) @ np.abs(V.T)
    if np.any(np.abs(product - right) > near * np.max(size) + 400 * 2.0**-24 * np.max(size)):
        return "frod_V: init-wrong-basis: of one layer V V^T is W^T W, or V is orthogonal where W has fewer rows than columns"
    condition = np.linalg.cond(V)
    rest = near * (np.abs(U) * L) @ np.abs(V.T) + 400 * 2.0**-24 * condition * np.max(np.abs(W))
    if method.init_weights and np.any(np.abs((U * L) @ V.T - W) > rest):
        return "frod_lambda_l: init-not-identity: U diag(L) V^T must be the frozen weight"
    if not method.init_weights and np.any(np.abs(L - np.linalg.norm(W @ np.linalg.pinv(V).T, axis=0)) > 0.8):
        return "frod_lambda_l: init-far-from-identity: the lengths plus a tenth of normal numbers, of which none is beyond 8"
    lengths = np.linalg.norm(U, axis=0)
    if np.any(np.abs(lengths[lengths > 0] - 1) > (W.shape[0] + 4) * 2.0 ** -min(PRECISION[dtype], 24)):  # HF rounds U to float32
        return "frod_U: init-not-of-length-one: every column has length one"
    return ""


SUITE = Suite(
    variants=VARIANTS,
    base_apart=True,
    mistakes=(
        Mistake(
            name="added-to-the-frozen",
            clause="FROD-C3",
            sentence="U (S + diag(L)) V^T is added to the frozen weight instead of taking its place",
            replay=other_delta(_added),
        ),
        Mistake(
            name="diagonal-ignored",
            clause="FROD-C1",
            sentence="the diagonal L is left out, and S alone acts",
            replay=_in_basis(lambda p, S, D: whole(p, S)),
        ),
        Mistake(
            name="places-ignored",
            clause="FROD-C1",
            sentence="what stands beside the diagonal is left out",
            replay=_in_basis(lambda p, S, D: _if_sparse(p, D)),
        ),
        Mistake(
            name="places-turned",
            clause="FROD-C2",
            sentence="the first row of places is read as columns, so that S is transposed",
            replay=_in_basis(lambda p, S, D: _if_sparse(p, sparse(p, turned=True) + D)),
        ),
        Mistake(
            name="places-from-one",
            clause="FROD-C2",
            sentence="the places are read as counted from one",
            replay=_in_basis(lambda p, S, D: _if_sparse(p, sparse(p, start=1) + D)),
        ),
        Mistake(
            name="places-drawn-again",
            clause="FROD-C6",
            sentence="the places are drawn from the seed although the file holds them",
            replay=as_if(_drawn_again),
        ),
        Mistake(
            name="S-scaled-by-L",
            clause="FROD-C1",
            sentence="S and the identity are both multiplied by L: U (S + I) diag(L) V^T",
            replay=_in_basis(lambda p, S, D: _if_sparse(p, S * p.L + D)),
        ),
        Mistake(
            name="V-not-transposed",
            clause="FROD-C5",
            sentence="V is multiplied as it stands instead of transposed",
            replay=_in_basis(lambda p, S, D: p.U @ (S + D) @ p.V),
        ),
        Mistake(
            name="V-inverse",
            clause="FROD-C1",
            sentence="V's inverse stands for its transpose, as if V were orthogonal",
            replay=_in_basis(lambda p, S, D: p.U @ (S + D) @ np.linalg.pinv(p.V.astype(np.float64), rcond=1e-6)),
        ),
        Mistake(
            name="U-reread",
            clause="FROD-C5",
            sentence="the numbers of U are read in the order of its transpose",
            replay=reread("frod_U"),
        ),
        Mistake(
            name="U-worked-out-again",
            clause="FROD-C7",
            sentence="U is worked out of the frozen weight and V although the case gives it",
            replay=_worked_out(lambda W, V: solved(W, V)[0]),
        ),
        Mistake(
            name="U-not-of-length-one",
            clause="FROD-C7",
            sentence="U is worked out of the frozen weight and V, and its columns are not divided by their lengths, which L holds too",
            replay=_worked_out(in_basis),
        ),
        Mistake(
            name="gradient-without-V",
            clause="FROD-C11",
            sentence="the gradients of L and s are read off U^T G, without V",
            replay=_gradients(L=lambda p, G: np.diag(p.U.T @ G), s=lambda p, G: _at(p.U.T @ G, p.places)),
        ),
        Mistake(
            name="gradient-of-s-turned",
            clause="FROD-C12",
            sentence="the gradient of s is read at the places with rows and columns exchanged",
            replay=_gradients(s=lambda p, G: _at(p.U.T @ G @ p.V, p.places[::-1])),
        ),
        Mistake(
            name="last-adapter-alone",
            clause="FROD-C8",
            sentence="of several active adapters the last one's weight takes the place of all",
            replay=_several(Formula(weight=lambda p: (_last_alone(p), p.b))),
        ),
        input_gradient_missing("FROD-C13"),
        only_first_adapter("FROD-C8"),
        *merging("FROD-C9", "FROD-C10"),
        Mistake(
            name="unmerge-saved-copy",
            clause="FROD-C10",
            sentence="unmerge puts a saved copy of the frozen weight back, whatever it is given, as HF PEFT does",
            replay=only(unmerge=_saved_copy),
            dialect=True,
        ),
        *dropout("FROD-C20"),
    ),
    fresh=Fresh(
        clause="FROD-C14",
        starts={
            "default": Start({}, ("linear", "transposed_linear"), 1),
            "wide": Start({"sparse_rate": 0.25, "projection_prng_key": 7}, ("linear-blocks",), 1),
            "dense": Start({"sparse_rate": 1.0}, draws=1),
            "false": Start({**PLAIN, "init_weights": False}),
        },
        laws=laws,
        identity=as_worked_out,
    ),
    files=Files(
        configs_clause="FROD-C17",
        keys_clause="FROD-C18",
        configs={
            "plain": {"sparse_rate": 0.2, "regularization_alpha": 0.01},
            "default": {},
            "seeded": {"projection_prng_key": 5, "save_projection": False},
        },
        told={},
    ),
)
