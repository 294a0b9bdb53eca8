"""RoAd: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from peft_ref import stack
from peft_ref.arrays import Array, column
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.distributions import Law, constant, normal
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    Replay,
    Suite,
    as_if,
    as_if_tensors,
    base_alone_backward,
    merged_twice,
    one_by_one,
    only,
    stored,
    unmerge_that_merges,
    unmerge_the_frozen,
    with_config,
)
from peft_ref.check.oracle import Problem, answer, pose
from peft_ref.check.shared_mistakes import only_first_adapter
from peft_ref.check.variants import RUN, Variant
from peft_ref.layers import Layer, Linear
from peft_ref.stack import Adapter

ONE = {"variant": "road_1", "group_size": 4}
TWO = {"variant": "road_2", "group_size": 4}
FOUR = {"variant": "road_4", "group_size": 4}
EVEN = ("linear-even",)


def angles(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """So small that no pair's matrix is nearly singular."""
    return rng.choice([-0.75, -0.5, -0.25, 0.25, 0.5, 0.75], shape)


def stretches(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return rng.choice([0.5, 0.75, 1.25, 1.5, 2.0], shape)


DRAWS = {"theta": angles, "alpha": stretches}

VARIANTS = (
    Variant(name="road-1", clause="ROAD-C4", configs=(ONE,), layers=EVEN, draws=DRAWS),
    Variant(name="road-2", clause="ROAD-C5", configs=(TWO,), layers=EVEN, draws=DRAWS),
    Variant(name="road-4", clause="ROAD-C6", configs=(FOUR,), layers=EVEN, draws=DRAWS),
    Variant(name="groups-of-six", clause="ROAD-C3", configs=({**TWO, "group_size": 6},), layers=EVEN, draws=DRAWS),
    Variant(name="one-group", clause="ROAD-C3", configs=({**FOUR, "group_size": 12},), layers=EVEN, draws=DRAWS),
    Variant(name="rounded", clause="ROAD-C1", configs=(ONE,), layers=EVEN, numbers="rounded", draws=DRAWS),
    Variant(name="small", clause="ROAD-C1", configs=(FOUR,), layers=EVEN, numbers="small", draws=DRAWS),
    Variant(name="vector", clause="ROAD-C1", configs=(ONE,), layers=EVEN, operations=RUN, rows=(), draws=DRAWS),
    Variant(name="no-bias", clause="ROAD-C1", configs=(TWO,), layers=EVEN, bias=False, draws=DRAWS),
    Variant(name="two-adapters", clause="ROAD-C9", configs=(ONE, {**FOUR, "group_size": 6}), layers=EVEN, draws=DRAWS),
)

Factors = Callable[[Adapter], tuple[Array, Array]]


def right(a: Adapter) -> tuple[Array, Array]:
    return a.method.factors(a.params)  # type: ignore[attr-defined,no-any-return]  # every method here is RoAd


def paired(a: Adapter, v: Array) -> Array:
    return a.method.paired(v)  # type: ignore[attr-defined]


def swapped(a: Adapter, v: Array) -> Array:
    return a.method._swapped(v)  # type: ignore[attr-defined]


def turning(factors: Factors, bias: bool = True) -> Formula:
    """W' from other factors c and s, undone by the determinants as it should be; with `bias` off the bias stays."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        c, s = factors(a)
        W = column(c) * W + column(s) * paired(a, W)
        return W, b if b is None or not bias else c * b + s * paired(a, b)

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        W, b = p.merged_W, p.merged_b
        for a in reversed(p.adapters):
            c, s = factors(a)
            other = swapped(a, c)
            det = c * other + s * swapped(a, s)
            W = (column(other) * W - column(s) * paired(a, W)) / column(det)
            b = b if b is None or not bias else (other * b - s * paired(a, b)) / det
        return W, b

    return Formula(weight=one_by_one(step), unmerge=unmerge)


def _sine_alone(a: Adapter) -> tuple[Array, Array]:
    ones = a.params._replace(alpha=a.params.alpha * 0.0 + 1.0)
    return right(a)[0], a.method.factors(ones)[1]  # type: ignore[attr-defined]


def _transposed(case: Case) -> Answer:
    """Unmerged by R^T, which would be the inverse of a rotation."""
    p = pose(case)
    W, b = p.merged_W, p.merged_b
    for a in reversed(p.adapters):
        c, s = right(a)
        W = column(c) * W - paired(a, column(s) * W)
        b = None if b is None else c * b - paired(a, s * b)
    return stored(p.layer, W, b)


def _keys(part: str, change: Callable[[NDArray, Mapping[str, object]], NDArray], undo: Callable[..., NDArray] | None = None) -> Replay:
    """The numbers under one key changed."""
    back = undo or change
    return as_if_tensors(
        lambda key, v, config: change(v, config) if part in key else v,
        lambda key, g, config: back(g, config) if part in key else g,
    )


def _cosines_first(v: NDArray, config: Mapping[str, object]) -> NDArray:
    """road_4 as it is read by who takes all that belongs to c first: the numbers that its c and s of every group then get."""
    if config["variant"] != "road_4":
        return v
    return v.reshape(2, -1, int(str(config["group_size"]))).swapaxes(0, 1).reshape(-1)


def _cosines_first_undone(g: NDArray, config: Mapping[str, object]) -> NDArray:
    if config["variant"] != "road_4":
        return g
    return g.reshape(-1, 2, int(str(config["group_size"]))).swapaxes(0, 1).reshape(-1)


def _one_group(case: Case) -> Case | None:
    assert case.layer is not None
    return with_config(case, lambda config: {**config, "group_size": case.layer.shape[0] if case.layer else 0})


OTHER_ORDER = Formula(
    weight=lambda p: stack.merge(p.layer, p.W, p.b, p.adapters[::-1]),
    unmerge=lambda p: stack.unmerge(p.layer, p.merged_W, p.merged_b, p.adapters[::-1], p.W),
)


def _adapters_reversed(case: Case) -> Answer | None:
    return OTHER_ORDER(case) if len(case.adapters) > 1 else None


def _bias_kept_in_merge(case: Case) -> Answer | None:
    return None if case.bias is None else {**answer(case), "bias": case.bias}


def _bias_gradient_lost(case: Case) -> Answer | None:
    if case.bias is None or len(case.adapters) > 1:
        return None
    return answer(replace(case, bias=None))


def _with_bias(replay: Replay) -> Replay:
    return lambda case: None if case.bias is None else replay(case)


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    if config["init_weights"]:
        return {"road_theta": constant(0.0, "init-not-identity"), "road_alpha": constant(1.0, "init-not-identity")}
    return {"road_theta": normal(0.5), "road_alpha": normal(0.5, mean=1.0)}


FRESH = Fresh(
    clause="ROAD-C17",
    starts={
        **{f"road-{n}": Start({"variant": f"road_{n}", "group_size": 4}, ("linear-even",)) for n in (1, 2, 4)},
        "false": Start({"group_size": 4, "init_weights": False}, ("linear-even",)),
    },
    laws=laws,
)
FILES = Files(
    configs_clause="ROAD-C19",
    keys_clause="ROAD-C20",
    configs={
        "small-groups": {"group_size": 2},
        "variant-missing": {"group_size": 4},
        "group-size-missing": {"variant": "road_2"},
        "both": {"variant": "road_4", "group_size": 2},
    },
    told={"variant": "variant", "group_size": "group_size"},
    saved_on={
        "model.layers.0.self_attn.v_proj": Linear(in_features=5, out_features=8),
        "model.layers.1.mlp.down_proj": Linear(in_features=7, out_features=6),
    },
)

SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        Mistake(
            name="turned-backwards",
            clause="ROAD-C1",
            sentence="the angle has the other sign: every pair is turned the other way",
            replay=_keys("theta", lambda v, config: -v),
        ),
        Mistake(
            name="angle-in-degrees",
            clause="ROAD-C2",
            sentence="the angle is taken for degrees instead of radians",
            replay=_keys("theta", lambda v, config: v * (math.pi / 180)),
        ),
        Mistake(
            name="alpha-ignored",
            clause="ROAD-C2",
            sentence="alpha is not applied: outputs are turned and not stretched",
            replay=_keys("alpha", lambda v, config: np.ones_like(v), lambda g, config: np.zeros_like(g)),
        ),
        Mistake(
            name="alpha-on-cosine-only",
            clause="ROAD-C2",
            sentence="alpha multiplies the cosine and not the sine",
            replay=turning(_sine_alone),
        ),
        Mistake(
            name="one-plus-alpha",
            clause="ROAD-C2",
            sentence="the stretch is 1 + alpha instead of alpha",
            replay=_keys("alpha", lambda v, config: 1.0 + v, lambda g, config: g),
        ),
        Mistake(
            name="neighbours-paired",
            clause="ROAD-C3",
            sentence="outputs are paired with their neighbours, as in the paper, instead of across the halves of a group",
            replay=as_if(lambda case: with_config(case, lambda config: {**config, "group_size": 2})),
        ),
        Mistake(
            name="group-size-ignored",
            clause="ROAD-C3",
            sentence="group_size is not read: all outputs are one group",
            replay=as_if(_one_group),
        ),
        Mistake(
            name="sine-of-the-other",
            clause="ROAD-C5",
            sentence="an output takes the sine of its partner: the sines stand in the columns of R, not in its rows",
            replay=turning(lambda a: (right(a)[0], swapped(a, right(a)[1]))),
        ),
        Mistake(
            name="cosines-first",
            clause="ROAD-C6",
            sentence="road_4's numbers are read as all of the cosines and then all of the sines, not group by group",
            replay=as_if_tensors(lambda key, v, config: _cosines_first(v, config), lambda key, g, config: _cosines_first_undone(g, config)),
        ),
        Mistake(
            name="bias-not-turned",
            clause="ROAD-C7",
            sentence="the weight is turned and the bias is not",
            replay=_with_bias(turning(right, bias=False)),
        ),
        Mistake(
            name="bias-in-merge",
            clause="ROAD-C7",
            sentence="the forward pass turns the bias, merging does not",
            replay=only(merge=_bias_kept_in_merge),
        ),
        only_first_adapter("ROAD-C9"),
        Mistake(
            name="adapters-reversed",
            clause="ROAD-C9",
            sentence="several adapters act last to first",
            replay=_adapters_reversed,
        ),
        Mistake(
            name="double-merge",
            clause="ROAD-C11",
            sentence="the adapter is merged twice",
            replay=only(merge=merged_twice),
        ),
        Mistake(
            name="unmerge-transposed",
            clause="ROAD-C12",
            sentence="unmerge multiplies by the transposed of R, which is its inverse only where alpha is one",
            replay=only(unmerge=_transposed),
        ),
        Mistake(
            name="unmerge-merges",
            clause="ROAD-C12",
            sentence="unmerge turns again instead of back",
            replay=only(unmerge=unmerge_that_merges),
        ),
        Mistake(
            name="unmerge-from-frozen",
            clause="ROAD-C12",
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="bias-gradient-lost",
            clause="ROAD-C13",
            sentence="the gradients of theta and alpha lack what flows through the bias",
            replay=only(backward=_bias_gradient_lost),
        ),
        Mistake(
            name="input-grad-missing",
            clause="ROAD-C16",
            sentence="the input's gradient is that of the frozen layer alone",
            replay=only(backward=base_alone_backward),
        ),
    ),
)
