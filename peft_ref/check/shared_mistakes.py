"""What ports get wrong alike, whatever the method: merging, dropout, several adapters. Each method cites the clauses of its own page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_ref.arrays import Array
from peft_ref.check.case import Answer, Case
from peft_ref.check.lora_family import DROPOUT
from peft_ref.check.mistake import (
    Formula,
    Mistake,
    base_alone_backward,
    first_adapter_alone,
    merged_twice,
    one_by_one,
    only,
    stored,
    unmerge_that_merges,
    unmerge_the_frozen,
)
from peft_ref.check.oracle import Problem, answer, pose
from peft_ref.layers import Layer
from peft_ref.stack import Adapter


def merging(merge: str, unmerge: str) -> tuple[Mistake, ...]:
    """Those of a method whose delta does not depend on what an earlier adapter made of the weight."""
    return (
        Mistake(name="double-merge", clause=merge, sentence="the adapter is merged twice", replay=only(merge=merged_twice)),
        Mistake(
            name="unmerge-from-frozen",
            clause=unmerge,
            sentence="unmerge starts from the frozen weight instead of the merged one it is given",
            replay=only(unmerge=unmerge_the_frozen),
        ),
        Mistake(
            name="unmerge-adds",
            clause=unmerge,
            sentence="unmerge adds the delta again instead of taking it out",
            replay=only(unmerge=unmerge_that_merges),
        ),
    )


def dropout(clause: str) -> tuple[Mistake, ...]:
    """No dropout, what is kept not divided or divided by p, and dropout on the frozen layer's input too."""
    wanted = ("dropout-missing", "dropout-not-rescaled", "dropout-divided-by-p", "dropout-on-base-too")
    return tuple(Mistake(name=m.name, clause=clause, sentence=m.sentence, replay=m.replay) for m in DROPOUT if m.name in wanted)


def only_first_adapter(clause: str) -> Mistake:
    sentence = "of several active adapters only the first one acts"
    return Mistake(name="only-first-adapter", clause=clause, sentence=sentence, replay=first_adapter_alone)


def input_gradient_missing(clause: str) -> Mistake:
    sentence = "the gradient of x stops at the adapter: only the frozen weight's part is there"
    return Mistake(name="input-grad-missing", clause=clause, sentence=sentence, replay=only(backward=base_alone_backward))


def other_delta(delta: Callable[[Layer, Any, Any, Array], Any]) -> Callable[[Case], Answer | None]:
    """A wrong delta, given layer, method, parameters and the frozen weight: W' = W + delta. None where it is no other one."""

    def step(layer: Layer, a: Adapter, W: Array, b: Array | None, W0: Array) -> tuple[Array, Array | None]:
        return W + delta(layer, a.method, a.params, W0), b

    def unmerge(p: Problem) -> tuple[Array, Array | None]:
        W = p.merged_W
        for a in p.adapters:
            W = W - delta(p.layer, a.method, a.params, p.W)
        return W, p.merged_b

    formula = Formula(weight=one_by_one(step), unmerge=unmerge)

    def replay(case: Case) -> Answer | None:
        p = pose(case)
        deltas = [delta(p.layer, a.method, a.params, p.W) for a in p.adapters]
        if any(d is None for d in deltas):
            return None
        return formula(case) if case.operation != "delta" else stored(p.layer, deltas[0], None)

    return replay


def parameter_gradients(other: Callable[[Case], Answer | None]) -> Callable[[Case], Answer | None]:
    """The parameters' gradients of another replay, dx right."""

    def backward(case: Case) -> Answer | None:
        wrong = other(case)
        return None if wrong is None else {**answer(case), **{name: g for name, g in wrong.items() if name != "x"}}

    return only(backward=backward)
