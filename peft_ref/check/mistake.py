"""Named mistakes: wrong versions of a method that people really wrote, and what a port's numbers are when it makes one.

A mistake is one of three kinds.
    as_if    the right answer to another case: the scale of another config, a transposed factor, a forgotten mask
    formula  a wrong map of the weight; outputs, merge and unmerge follow from it, and its gradient is what autograd would return
    only     a wrong answer to single operations, everything else right
Each says where it does not show by answering None.

`mistakes/` has one module per method: its variants (what is asked) and its mistakes (what goes wrong). A mistake that no case catches, or
that no case tells from another, fails a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from peft_ref import stack
from peft_ref.arrays import Array
from peft_ref.check import tape
from peft_ref.check.asked import Files, Fresh
from peft_ref.check.attending import AttentionVariant
from peft_ref.check.case import BACKWARD_OPERATIONS, Answer, Case, NDArray
from peft_ref.check.oracle import Problem, answer, name_gradients, pose, solve
from peft_ref.check.prompting import PromptVariant
from peft_ref.check.variants import Variant
from peft_ref.layers import Layer
from peft_ref.stack import Adapter

Replay: TypeAlias = Callable[[Case], Answer | None]
Retensor: TypeAlias = Callable[[str, NDArray, Mapping[str, Any]], NDArray]  # key, numbers, configuration


@dataclass(frozen=True, kw_only=True)
class Mistake:
    name: str
    clause: str  # what it breaks: an id in spec/methods
    sentence: str  # completes "Your numbers are what you get when ..."
    replay: Replay = field(repr=False)
    links: tuple[str, ...] = ()
    dialect: bool = False  # another reading that its users rely on: named, and not counted as wrong


@dataclass(frozen=True, kw_only=True, eq=False)
class Suite:
    """What is asked about one method, and its known mistakes."""

    variants: tuple[Variant, ...]
    mistakes: tuple[Mistake, ...]
    prompts: tuple[PromptVariant, ...] = ()  # what is asked of a method of prompts, which has no layers
    attention: tuple[AttentionVariant, ...] = ()  # what is asked of a method that adds to attention
    fresh: Fresh | None = None  # how its fresh adapters start
    files: Files | None = None  # what its configurations mean, under which keys it is saved
    cases: tuple[Case, ...] = ()  # questions that are about no layer
    transformed: Callable[[Case], Answer] | None = None  # sizes that an honest order, a Fourier transform, goes through
    base_apart: bool = False  # an honest order also subtracts the frozen layer's own answer and adds it again


@dataclass(frozen=True)
class AsIf:
    """The right answer to the changed case; None where there is nothing to change.

    Where a tensor is changed, `undo` makes the gradient of the changed tensor that of the stored one, as an autograd engine does.
    """

    change: Callable[[Case], Case | None]
    undo: Callable[[Case, Answer], Answer] = lambda case, gradients: gradients

    def __call__(self, case: Case) -> Answer | None:
        changed = self.change(case)
        if changed is None:
            return None
        return self.undo(case, answer(changed)) if case.operation in BACKWARD_OPERATIONS else answer(changed)

    def then(self, other: AsIf) -> AsIf:
        """Both changes at once."""

        def both(case: Case) -> Case | None:
            first = self.change(case)
            second = other.change(case if first is None else first)
            return first if second is None else second

        return AsIf(both, lambda case, gradients: self.undo(case, other.undo(case, gradients)))


def as_if(change: Callable[[Case], Case | None]) -> Replay:
    return AsIf(change)


def as_if_tensors(change: Retensor, undo: Retensor | None = None) -> Replay:
    """The right answer with other tensors, given key, numbers and configuration. `undo` is the change's transpose: by default itself."""

    def gradients(case: Case, out: Answer) -> Answer:
        def stored_one(name: str, g: NDArray) -> NDArray:
            index, _, key = name.partition(".")
            return g if not key else (undo or change)(key, g, case.adapters[int(index)].config)

        return {name: stored_one(name, g) for name, g in out.items()}

    return AsIf(lambda case: with_tensors(case, change), gradients)


def only(**wrong: Callable[[Case], Answer | None]) -> Replay:
    """Wrong answers to the named operations."""

    def replay(case: Case) -> Answer | None:
        return wrong[case.operation](case) if case.operation in wrong else None

    return replay


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A wrong effective weight of the whole stack of adapters: outputs, gradients and merge follow."""

    weight: Callable[[Problem], tuple[Array, Array | None]]
    unmerge: Callable[[Problem], tuple[Array, Array | None]] | None = None

    def __call__(self, case: Case) -> Answer | None:
        if case.operation == "forward":
            return {"y": self.forward(pose(case))}
        if case.operation == "backward":
            return autograd(case, self.forward)
        if case.operation == "merge":
            return stored(pose(case).layer, *self.weight(pose(case)))
        if case.operation == "unmerge" and self.unmerge is not None:
            return stored(pose(case).layer, *self.unmerge(pose(case)))
        return None

    def forward(self, p: Problem) -> Array:
        if not any(a.dropout for a in p.adapters):
            return p.layer.apply(p.x, *self.weight(p))
        y = p.layer.apply(p.x, p.W, p.b)
        for a in p.adapters:
            W, b = self.weight(p._replace(adapters=(a,)))
            y = y + p.layer.apply(dropped(p.x, a), W - p.W, None if b is None or b is p.b else b - p.b)
        return y


def one_by_one(step: Callable[[Layer, Adapter, Array, Array | None, Array], tuple[Array, Array | None]]) -> Callable[[Problem], Any]:
    """The stack's weight from a wrong map of one adapter, given (layer, adapter, W, b, W0)."""

    def weight(p: Problem) -> tuple[Array, Array | None]:
        W, b = p.W, p.b
        for a in p.adapters:
            W, b = step(p.layer, a, W, b, p.W)
        return W, b

    return weight


def autograd(case: Case, forward: Callable[[Problem], Array]) -> Answer:
    """What an autograd engine returns for a wrong forward."""
    p = pose(case, tape.tape_array)
    assert case.dy is not None
    tape.backward(forward(p), case.dy)
    grads = [a.method.to_params(**{f: tape.gradients(getattr(a.params, f)) for f in trained(p.layer, a)}) for a in p.adapters]
    out: Answer = {}
    if p.x is not None and p.x.dtype == object:
        out["x"] = tape.gradients(p.x)
    return {**out, **name_gradients(p.layer, p.adapters, tuple(grads))}


def trained(layer: Layer, adapter: Adapter) -> list[str]:
    """The fields that have a gradient."""
    return [s.field for s in adapter.method.spec(layer) if s.trained]


def dropped(x: Array, adapter: Adapter) -> Array:
    return x * adapter.dropout.mask / (1 - adapter.dropout.p) if isinstance(adapter.dropout, stack.Dropout) else x


def with_config(case: Case, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Case | None:
    """The case with every adapter's configuration changed; None if none changes."""
    changed = [change(dict(a.config)) for a in case.adapters]
    if all(c is None or c == dict(a.config) for c, a in zip(changed, case.adapters, strict=True)):
        return None
    adapters = (a if c is None else replace(a, config=c) for a, c in zip(case.adapters, changed, strict=True))
    return replace(case, adapters=tuple(adapters))


def with_tensors(case: Case, change: Retensor) -> Case | None:
    """The case with every adapter's tensors changed; None if none changes."""
    adapters, differs = [], False
    for a in case.adapters:
        tensors = {k: change(k, v, a.config) for k, v in a.tensors.items()}
        differs |= any(not np.array_equal(tensors[k], v) for k, v in a.tensors.items())
        adapters.append(replace(a, tensors=tensors))
    return replace(case, adapters=tuple(adapters)) if differs else None


def stored(layer: Layer, W: Array, b: Array | None) -> Answer:
    out = {"weight": layer.unfold(W)}
    return out if b is None else {**out, "bias": b}


def with_scale(scale: Callable[[float, int, bool], float], alpha: str = "lora_alpha") -> Replay:
    """The right answer with another scale, given (alpha, r, use_rslora) of each adapter."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        rslora = config.get("use_rslora", False)
        wrong = scale(config[alpha], config["r"], rslora)
        right = config[alpha] / (math.sqrt(config["r"]) if rslora else config["r"])
        plain = {"use_rslora": False} if rslora else {}
        return config if wrong == right else {**config, alpha: wrong * config["r"], **plain}

    return as_if(lambda case: with_config(case, change))


def reread(key_part: str) -> Replay:
    """A factor whose numbers are read in the other order: (r, in) as (in, r), or (out, r) as (r, out)."""

    def change(key: str, v: NDArray, config: Mapping[str, Any]) -> NDArray:
        return v.reshape(v.shape[::-1]).T if key_part in key and v.ndim == 2 else v

    def undo(key: str, g: NDArray, config: Mapping[str, Any]) -> NDArray:
        return g.T.reshape(g.shape) if key_part in key and g.ndim == 2 else g

    return as_if_tensors(change, undo)


def gradients_times(factor: Callable[[Mapping[str, Any]], float], keys: str = "") -> Replay:
    """Parameter gradients (of keys that contain `keys`) off by a factor of the adapter's configuration; dx is right."""

    def backward(case: Case) -> Answer:
        right = answer(case)
        return {
            name: g * factor(case.adapters[int(name.split(".")[0])].config) if name != "x" and keys in name else g
            for name, g in right.items()
        }

    return only(backward=backward)


def merged_twice(case: Case) -> Answer:
    p = pose(case)
    return solve(p._replace(adapters=p.adapters * 2), "merge")


def unmerge_that_merges(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, *stack.merge(p.layer, p.merged_W, p.merged_b, p.adapters))


def unmerge_the_frozen(case: Case) -> Answer:
    p = pose(case)
    return stored(p.layer, *stack.unmerge(p.layer, p.W, p.b, p.adapters, p.W, p.b))


def base_alone_backward(case: Case) -> Answer | None:
    """The input's gradient stops at the adapter."""
    p = pose(case)
    dx = p.layer.input_vjp(p.x, p.W, p.dy)
    return None if dx is None else {**answer(case), "x": dx}


def first_adapter_alone(case: Case) -> Answer | None:
    if len(case.adapters) < 2:
        return None
    out = answer(replace(case, adapters=case.adapters[:1]))
    if case.operation != "backward":
        return out
    idle = {name: np.zeros(v.shape) for name, v in answer(case).items() if not name.startswith(("x", "0."))}
    return {**out, **idle}


def without_dropout(case: Case) -> Case | None:
    if not any(a.dropout for a in case.adapters):
        return None
    return replace(case, adapters=tuple(replace(a, dropout=None) for a in case.adapters))
