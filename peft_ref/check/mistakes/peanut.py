"""PEANuT: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from peft_ref import stack
from peft_ref.activations import FUNCTIONS
from peft_ref.arrays import Array
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.distributions import Law, constant, uniform
from peft_ref.check.mistake import Formula, Mistake, Replay, Suite, as_if, only, reread, stored, with_config
from peft_ref.check.oracle import Problem, answer, pose
from peft_ref.check.shared_mistakes import input_gradient_missing, merging, only_first_adapter, other_delta
from peft_ref.check.variants import RUN, Draw, Variant
from peft_ref.layers import Layer
from peft_ref.methods.peanut import PEANuT

PLAIN = {"r": 3}
ONE = {"r": 3, "depth": 1, "scaling": 0.5}
DEEP = {"r": 3, "depth": 2, "act_fn": "tanh", "scaling": 1.5}
LINEAR = {"r": 2, "depth": 2, "act_fn": "linear", "scaling": 0.5}


def odd(denominator: int, largest: int) -> Draw:
    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
        odds = range(1, largest + 1, 2)
        return rng.choice([sign * n / denominator for n in odds for sign in (1, -1)], shape)

    return draw


def rungs(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """1, 2, 4, ... from column to column: odd numbers times these never add up to zero either."""
    return np.asarray(rng.choice([-1.0, 1.0], shape) * 2.0 ** np.arange(shape[1]))


def odd_weight(rng: np.random.Generator, shape: tuple[int, int], tensors: Mapping[str, NDArray]) -> NDArray:
    """Seven odd numbers never add up to zero, where relu has its corner."""
    return odd(2, 3)(rng, shape)


def small_weight(rng: np.random.Generator, shape: tuple[int, int], tensors: Mapping[str, NDArray]) -> NDArray:
    return odd(1, 1)(rng, shape)


HIDDEN = {f"{side}{i}": odd(64, 63) for side in "ED" for i in (1, 2)} | {"B": odd(8, 15)}  # hardly a sum of these is zero
ODD = {"A": odd(1, 1), **HIDDEN}
GENTLE = {"A": odd(16, 3), **HIDDEN}

VARIANTS = (
    Variant(name="plain", clause="PEANUT-C1", configs=(PLAIN,), draws=ODD, weight=odd_weight),
    Variant(name="one", clause="PEANUT-C4", configs=(ONE,), draws=ODD, weight=odd_weight),
    Variant(name="deep", clause="PEANUT-C5", configs=(DEEP,), draws=GENTLE, weight=odd_weight),
    Variant(name="linear", clause="PEANUT-C5", configs=(LINEAR,), draws=GENTLE, weight=odd_weight),
    Variant(name="small", clause="PEANUT-C1", configs=(PLAIN,), numbers="small", draws={"A": odd(1, 1), "B": rungs}, weight=small_weight),
    Variant(
        name="rounded", clause="PEANUT-C6", configs=({**DEEP, "scaling": 5 / 3},), layers=("linear-large",), draws=GENTLE, weight=odd_weight
    ),
    Variant(name="vector", clause="PEANUT-C1", configs=(PLAIN,), operations=RUN, rows=(), draws=ODD, weight=odd_weight),
    Variant(name="no-bias", clause="PEANUT-C2", configs=(ONE,), bias=False, draws=ODD, weight=odd_weight),
    Variant(name="two-adapters", clause="PEANUT-C9", configs=(PLAIN, LINEAR), draws={**GENTLE, **ODD}, weight=odd_weight),
)

Function = Callable[[Array], Array]


def network(
    method: PEANuT,
    p: Any,
    W: Array,
    *,
    first: Function | None = None,
    last: Callable[[Function, Array], Array] = lambda f, y: y,
    order: str = "ED",
    skip: Callable[[Function, Array, list[Array], int], Array] = lambda f, u, seen, i: f(u) + seen[-1 - i],
) -> Array:
    """dW of another network: f after A, what is done to the output, whose matrices come first, what a decoder makes of what is skipped."""
    f, seen = FUNCTIONS[method.act_fn].f, []
    z = (first or f)(W.T @ p.A.T)
    for i in range(method.depth):
        seen.append(z)
        z = f(z @ getattr(p, f"{order[0]}{i + 1}").T)
    for i in range(method.depth):
        z = skip(f, z @ getattr(p, f"{order[1]}{i + 1}").T, seen, i)
    return method.scaling * last(f, z @ p.B.T).T


def differing(deepest: int = 0, **how: Any) -> Replay:
    """Another network; None where no adapter is so deep that it shows."""
    replay = other_delta(lambda layer, method, p, W0: network(method, p, W0, **how))
    return lambda case: replay(case) if any(a.config["depth"] >= deepest for a in case.adapters) else None


def _configured(**words: Any) -> Replay:
    return as_if(lambda case: with_config(case, lambda config: {**config, **words}))


def _composed(p: Problem) -> tuple[Array, Array | None]:
    W, b = p.W, p.b
    for a in p.adapters:
        W, b = stack.merge(p.layer, W, b, [a])
    return W, b


def _several(replay: Formula) -> Replay:
    return lambda case: replay(case) if len(case.adapters) > 1 and case.operation != "unmerge" else None


def _restored(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, p.W, p.merged_b)


def _network_held(case: Case) -> Answer:
    return {name: g if name == "x" or "peanut_B" in name else g * 0.0 for name, g in answer(case).items()}


def laws(config: Config, layer: Layer) -> Mapping[str, Law]:
    method = PEANuT(**{k: v for k, v in config.items() if k != "peft_type"})
    found = {s.key: uniform(1 / math.sqrt(s.shape[1])) for s in method.spec(layer)}
    return {**found, "peanut_B.weight": constant(0.0, "init-not-identity")} if config["init_weights"] else found


FRESH = Fresh(
    clause="PEANUT-C15",
    starts={"default": Start({"r": 4}), "deep": Start({"r": 4, "depth": 2}), "false": Start({"r": 4, "init_weights": False})},
    laws=laws,
)
FILES = Files(
    configs_clause="PEANUT-C17",
    keys_clause="PEANUT-C18",
    configs={"deep": {"r": 3, "depth": 2, "act_fn": "tanh"}, "rank-missing": {}, "scaled": {"r": 4, "scaling": 0.5}},
    told={word: word for word in ("r", "depth", "scaling", "act_fn")},
)


def _mistake(name: str, clause: str, sentence: str, replay: Replay, dialect: bool = False) -> Mistake:
    return Mistake(name=name, clause=clause, sentence=sentence, replay=replay, dialect=dialect)


SUITE = Suite(
    variants=VARIANTS,
    fresh=FRESH,
    files=FILES,
    mistakes=(
        _mistake("activation-missing", "PEANUT-C3", "the network has no activation", _configured(act_fn="linear")),
        _mistake("relu-always", "PEANUT-C3", "act_fn is not read: every activation is relu", _configured(act_fn="relu")),
        _mistake(
            "first-activation-missing",
            "PEANUT-C3",
            "there is no activation after A",
            differing(1, first=lambda u: u),
        ),
        _mistake("last-activated", "PEANUT-C6", "the activation acts on the network's output too", differing(last=lambda f, y: f(y))),
        _mistake("scaling-ignored", "PEANUT-C6", "scaling is not read", _configured(scaling=1.0)),
        _mistake("skips-missing", "PEANUT-C5", "the decoders have no skip connections", differing(1, skip=lambda f, u, seen, i: f(u))),
        _mistake(
            "skips-in-order",
            "PEANUT-C5",
            "the first decoder receives what went into the first encoder, not into the last",
            differing(2, skip=lambda f, u, seen, i: f(u) + seen[i]),
        ),
        _mistake(
            "skip-before-activation",
            "PEANUT-C5",
            "what is skipped is added before a decoder's activation, not after it",
            differing(1, skip=lambda f, u, seen, i: f(u + seen[-1 - i])),
        ),
        _mistake(
            "coders-swapped",
            "PEANUT-C4",
            "the decoders' matrices are taken for the encoders' and theirs for the decoders'",
            differing(1, order="DE"),
        ),
        _mistake(
            "coders-transposed", "PEANUT-C7", "the hidden matrices multiply from the wrong side: Z E instead of Z E^T", reread("coders")
        ),
        _mistake("a-transposed", "PEANUT-C7", "the numbers of A are read as (out, r) instead of (r, out)", reread("peanut_A")),
        _mistake("b-transposed", "PEANUT-C7", "the numbers of B are read as (r, out) instead of (out, r)", reread("peanut_B")),
        only_first_adapter("PEANUT-C9"),
        _mistake(
            "adapters-composed",
            "PEANUT-C9",
            "each adapter's network reads what the one before made of the weight, not the frozen one",
            _several(Formula(weight=_composed)),
        ),
        *merging("PEANUT-C10", "PEANUT-C11"),
        _mistake(
            "unmerge-restores",
            "PEANUT-C11",
            "unmerge puts a copy of the frozen weight back, as HF PEFT does, whatever it is given",
            only(unmerge=_restored),
            dialect=True,
        ),
        _mistake(
            "grad-network-held",
            "PEANUT-C13",
            "the network is held constant in the gradient: B alone is trained",
            only(backward=_network_held),
        ),
        input_gradient_missing("PEANUT-C14"),
    ),
)
