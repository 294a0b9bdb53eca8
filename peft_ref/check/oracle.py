"""The right answer to a case, in whatever numbers it is asked in: float64, another backend's arrays, or `Exact`.

`right_answer` is where every operation meets its meaning. For those about a layer, `Problem` is a case with its arrays lifted and its
methods built, and `solve` answers it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from peft_ref import stack
from peft_ref.arrays import Array
from peft_ref.check import training
from peft_ref.check.attending import pose_attention, solve_attention
from peft_ref.check.case import ATTENTION_OPERATIONS, PROMPT_OPERATIONS, TRAINING_OPERATIONS, Answer, Case, NDArray, build_method
from peft_ref.check.exact import answered, exact_array
from peft_ref.check.prompting import pose_prompt, solve_prompt
from peft_ref.contracts import Additive, LowRank
from peft_ref.layers import Layer, Linear
from peft_ref.stack import Adapter, Dropout

Lift: TypeAlias = Callable[[NDArray], Array]
FROZEN = ("weight", "bias", "x", "dy", "merged_weight", "merged_bias")


class Problem(NamedTuple):
    layer: Layer
    W: Array
    b: Array | None
    adapters: tuple[Adapter, ...]
    x: Array | None
    dy: Array | None
    merged_W: Array | None
    merged_b: Array | None


def float64(array: NDArray) -> NDArray:
    return array if array.dtype.kind in "iub" else array.astype(np.float64)


def pose(case: Case, lift: Lift = float64) -> Problem:
    """The case's arrays in the lifted numbers, its weight folded to a matrix."""

    def maybe(array: NDArray | None) -> Array | None:
        return None if array is None else lift(array)

    layer = case.layer
    if layer is None or case.weight is None:
        raise ValueError(f"case {case.id}: {case.operation} is not about a layer")
    adapters = []
    for a in case.adapters:
        method = build_method(case.method, a.config)
        # A question about fresh adapters brings none.
        params = method.unpack(layer, {k: lift(v) for k, v in a.tensors.items()}) if a.tensors else None
        dropout = None if a.dropout is None else Dropout(lift(a.dropout[0]), a.dropout[1])
        adapters.append(Adapter(method, params, dropout))
    merged = None if case.merged_weight is None else layer.fold(lift(case.merged_weight))
    return Problem(
        layer,
        layer.fold(lift(case.weight)),
        maybe(case.bias),
        tuple(adapters),
        maybe(case.x),
        maybe(case.dy),
        merged,
        maybe(case.merged_bias),
    )


def solve(problem: Problem, operation: str) -> dict[str, Array]:
    """The arrays that `operation` asks for, by name, in their stored layout."""
    layer, W, b, adapters, x, dy, merged_W, merged_b = problem
    if operation == "forward":
        return {"y": stack.forward(layer, W, b, adapters, x)}
    if operation == "backward":
        grads = stack.vjp(layer, W, b, adapters, x, dy)
        out = {} if grads.x is None else {"x": grads.x}
        return {**out, **name_gradients(layer, adapters, grads.params)}
    if operation == "delta":
        return {"weight": layer.unfold(static_delta(layer, adapters[0]))}
    if operation == "merge":
        return _weights(layer, *stack.merge(layer, W, b, adapters))
    if operation == "unmerge":
        return _weights(layer, *stack.unmerge(layer, merged_W, merged_b, adapters, W, b))
    raise ValueError(f"no arrays answer the operation {operation!r}")


def right_answer(case: Case, lift: Lift = float64) -> dict[str, Array]:
    """The right answer, computed in the lifted numbers."""
    if case.operation in PROMPT_OPERATIONS:
        return solve_prompt(pose_prompt(case, lift), case.operation)
    if case.operation in ATTENTION_OPERATIONS:
        return solve_attention(pose_attention(case, lift), case.operation)
    if case.operation in TRAINING_OPERATIONS:
        return training.solve(case, lift)
    return solve(pose(case, lift), case.operation)


def answer(case: Case) -> Answer:
    """The right answer in float64."""
    return right_answer(case)


def exact_answer(case: Case, p: int) -> dict[str, NDArray]:
    """The right answer as object arrays of `Exact`, with what may round in a format of `p` significant bits."""
    right = right_answer(case, lambda array: exact_array(array, p))
    return {name: answered(array, p) for name, array in right.items()}


def static_delta(layer: Layer, adapter: Adapter) -> Array:
    if not isinstance(adapter.method, LowRank | Additive):
        raise ValueError(f"{type(adapter.method).__name__} has no additive delta")
    return adapter.method.delta(layer, adapter.params).W


def name_gradients(layer: Layer, adapters: tuple[Adapter, ...], grads: tuple[Any, ...]) -> dict[str, Array]:
    """Every adapter's gradients as "<index>.<checkpoint key>", in stored shapes."""
    return {
        f"{i}.{key}": value for i, (a, g) in enumerate(zip(adapters, grads, strict=True)) for key, value in a.method.pack(layer, g).items()
    }


def _weights(layer: Layer, W: Array, b: Array | None) -> dict[str, Array]:
    weights = {"weight": layer.unfold(W)}
    return weights if b is None else {**weights, "bias": b}


def null_answer(case: Case) -> Answer:
    """What a port answers that has no adapters at all: the frozen layer, zero gradients; or that does nothing when it trains."""
    if case.operation in TRAINING_OPERATIONS:
        return training.nothing_done(case)
    if case.operation in ("forward", "merge"):
        return solve(pose(case)._replace(adapters=()), case.operation)
    if case.operation == "unmerge":
        p = pose(case)
        return _weights(p.layer, p.merged_W, p.merged_b)
    zeros = {name: np.zeros_like(v) for name, v in answer(case).items()}
    if "x" in zeros and case.layer is not None:
        p = pose(case)
        zeros["x"] = np.asarray(p.layer.input_vjp(p.x, p.W, p.dy))
    return zeros


def in_size(case: Case) -> Case:
    """The case with the sizes of the frozen layer's numbers: what its own answer adds up to without any cancellation."""
    sizes: dict[str, Any] = {name: None if (v := getattr(case, name)) is None else np.abs(v) for name in FROZEN}
    return replace(case, **sizes)


def mixed(case: Case) -> Answer:
    """The sizes that a Fourier transform of the adapter's numbers goes through: as if each were as large as the largest among them."""

    def largest(array: NDArray | None) -> NDArray | None:
        return None if array is None else np.full(array.shape, np.max(np.abs(array), initial=0.0))

    def nothing(array: NDArray | None) -> NDArray | None:
        return None if array is None else np.zeros(array.shape)

    adapters = tuple(replace(a, tensors={k: np.asarray(largest(v)) for k, v in a.tensors.items()}) for a in case.adapters)
    frozen: dict[str, Any] = {name: nothing(getattr(case, name)) for name in ("weight", "bias", "merged_weight", "merged_bias")}
    return {k: np.abs(v) for k, v in answer(replace(case, adapters=adapters, x=largest(case.x), dy=largest(case.dy), **frozen)).items()}


def smoke_case() -> Case:
    """A frozen linear layer without adapters: what every harness must get right."""
    rng = np.random.Generator(np.random.PCG64(1))
    return Case(
        id="smoke",
        method="frozen",
        operation="forward",
        clause="",
        layer=Linear(in_features=3, out_features=2),
        weight=rng.choice([-1.5, -0.5, 0.5, 1.0, 2.0], (2, 3)),
        bias=np.asarray([0.5, -1.0]),
        x=rng.choice([-1.5, -0.5, 0.5, 1.0, 2.0], (4, 3)),
    )
