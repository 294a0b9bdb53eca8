"""Operations about training, all modules of a model together: AdaLoRA's penalty and its rank allocator.

    aux_loss   adapter_config, parameters                                -> loss, gradients
    allocate   adapter_config, steps of step, parameters and gradients   -> steps, sensitivity, uncertainty

Tensors come by the module's name and then by their checkpoint key, {"q_proj": {"lora_A": ...}}; in an answer that is flat they are
called "gradients.q_proj.lora_A", "steps.2.q_proj.lora_E" (after step 2), "sensitivity.q_proj.lora_B".

Every step of `allocate` brings the parameters that the optimiser left, so what the allocator made of them at the step before goes no
further, and no rounding adds up but that of the two averages. They are answered as they were updated last: masks alone do not show all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from peft_ref.arrays import Array, zeros_like
from peft_ref.check.case import Answer, Case, NDArray, build_method
from peft_ref.check.exact import as_exact, exact_array
from peft_ref.check.tolerance import PRECISION, Expected, expect
from peft_ref.methods.adalora import AdaLoRA, Params
from peft_ref.methods.adalora_allocator import State, after_step, last_allocation, pruned_at, scores

KEYS = Params(A="lora_A", E="lora_E", B="lora_B")
TREES = ("gradients", "sensitivity", "uncertainty")  # of an answer: module -> key -> array
STEPS = "steps"  # of an answer: the same, by the number of the step

Lift: TypeAlias = Callable[[NDArray], Array]
After: TypeAlias = Callable[[AdaLoRA, State, Mapping[str, Params], Mapping[str, Params], int], tuple[State, dict[str, Params]]]


class Step(NamedTuple):
    number: int
    params: dict[str, Params]  # as the optimiser left them
    grads: dict[str, Params]  # that it used


def method_of(case: Case) -> AdaLoRA:
    method = build_method(case.method, case.question["adapter_config"])
    if not isinstance(method, AdaLoRA):
        raise ValueError(f"case {case.id}: {case.operation} is asked of AdaLoRA alone")
    return method


def parameters_of(case: Case, lift: Lift) -> dict[str, Params]:
    """What `aux_loss` is asked about."""
    return _by_module(case.question["parameters"], lift)


def steps_of(case: Case, lift: Lift) -> Iterator[Step]:
    for step in case.question["steps"]:
        yield Step(step["step"], _by_module(step["parameters"], lift), _by_module(step["gradients"], lift))


def solve(case: Case, lift: Lift) -> dict[str, Array]:
    """The right answer in the lifted numbers."""
    method = method_of(case)
    if case.operation == "allocate":
        return traced(case, lift, after_step)
    if case.operation != "aux_loss":
        raise ValueError(f"case {case.id}: no operation {case.operation!r} is about training")
    params = parameters_of(case, lift)
    return {"loss": method.orthogonality(params), **named("gradients", method.orthogonality_vjp(params, 1.0))}


def traced(case: Case, lift: Lift, after: After) -> dict[str, Array]:
    """The answer to `allocate` of whatever `after` does at every step: the parameters it leaves, and its averages as they were last."""
    method, state, averages = method_of(case), State(), State()
    out: dict[str, Array] = {}
    for step in steps_of(case, lift):
        state, left = after(method, state, step.params, step.grads, step.number)
        out |= named(f"{STEPS}.{step.number}", left)
        averages = state if state.sensitivity is not None else averages
    assert averages.sensitivity is not None  # every trace begins before the last allocation
    assert averages.uncertainty is not None
    return {**out, **named("sensitivity", averages.sensitivity), **named("uncertainty", averages.uncertainty)}


def nothing_done(case: Case) -> Answer:
    """What a port answers that knows no penalty, or whose allocator does nothing: zeros, and parameters as they were given."""
    if case.operation == "allocate":
        return traced(case, _float64, _untouched)
    return {name: np.zeros_like(v) for name, v in solve(case, _float64).items()}


def open_triplets(case: Case, dtype: str) -> dict[str, NDArray]:
    """By the flat names of E after each step: where rounding in `dtype` may decide whether a triplet stays, and any decision is right.

    Between allocations nothing is masked, and so nothing open; after the last one what was open there stays so.
    """
    p, method, state, held, out = PRECISION[dtype], method_of(case), State(), None, {}
    for step in steps_of(case, lambda array: exact_array(array, p)):
        before = state
        state, _ = after_step(method, before, step.params, step.grads, step.number)
        pruned = pruned_at(method, step.params, step.number)
        if state.kept is before.kept:  # no allocation: nothing is masked yet, or the pattern is frozen
            held = held if step.number > last_allocation(method) else None
        elif pruned > 0:
            found = scores(state if state.sensitivity is not None else before)
            expected = expect({name: as_exact(s, p) for name, s in found.items()}, dtype)
            values, drift = (np.concatenate(list(v.values())) for v in (expected.values, expected.tolerance))
            held = _split(either_way(values, drift, pruned), found)
        for name, where in (held or {}).items():
            out[f"{STEPS}.{step.number}.{name}.{KEYS.E}"] = where[:, None]
    return out


def either_way(score: NDArray, drift: NDArray, pruned: int) -> NDArray:
    """Which of the triplets may go and may stay when each score is anywhere within its drift.

    One goes when less than `pruned` scores are below its own. That is sure where less than so many of the others' lowest are below its
    highest; it is sure to stay where that many of the others' highest are below its lowest.
    """
    low, high = score - drift, score + drift
    may_be_below = np.sum(low[None, :] < high[:, None], axis=1) - (drift > 0)  # without itself
    sure_below = np.sum(high[None, :] < low[:, None], axis=1)
    return np.asarray((may_be_below >= pruned) & (sure_below < pruned))


def with_open_triplets(case: Case, dtype: str, expected: Expected) -> Expected:
    """The right answer to `allocate`, where an open triplet's E may be zero or not."""
    size = {name: np.abs(v) for name, v in traced(case, _float64, _untouched).items()}
    wide = {name: where * size[name] for name, where in open_triplets(case, dtype).items() if where.any()}
    tolerance = {name: t + wide.get(name, 0.0) for name, t in expected.tolerance.items()}
    likely = {name: t + wide.get(name, 0.0) for name, t in expected.likely.items()}
    return Expected(expected.values, tolerance, likely, expected.exact and not wide)


def named(prefix: str, modules: Mapping[str, Params]) -> dict[str, Array]:
    return {f"{prefix}.{name}.{key}": value for name, p in modules.items() for key, value in zip(KEYS, p, strict=True)}


# ---- answers as JSON


def flat(answer: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors of an answer by their flat names; what else it holds is left out."""
    trees = [(name, answer[name]) for name in TREES if name in answer]
    trees += [(f"{STEPS}.{number}", tree) for number, tree in answer.get(STEPS, {}).items()]
    for prefix, tree in trees:
        for module, tensors in tree.items():
            for key, value in tensors.items():
                yield f"{prefix}.{module}.{key}", value


def nested(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The other way: flat names as the object that a port sends. No key of AdaLoRA's has a dot in it."""
    out: dict[str, Any] = {}
    for name, value in answer.items():
        tree, _, rest = name.partition(".")
        if tree == STEPS:
            number, _, rest = rest.partition(".")
            holder = out.setdefault(STEPS, {}).setdefault(number, {})
        elif tree in TREES:
            holder = out.setdefault(tree, {})
        else:
            out[name] = value
            continue
        module, _, key = rest.rpartition(".")
        holder.setdefault(module, {})[key] = value
    return out


def _by_module(given: Mapping[str, Mapping[str, NDArray]], lift: Lift) -> dict[str, Params]:
    return {name: Params(*(lift(_float64(tensors[key])) for key in KEYS)) for name, tensors in given.items()}


def _split(every: NDArray, like: Mapping[str, Array]) -> dict[str, NDArray]:
    """What was put together, by module again."""
    ends = np.cumsum([v.shape[0] for v in like.values()])
    return dict(zip(like, np.split(every, ends[:-1]), strict=True))


def _untouched(
    method: AdaLoRA, state: State, params: Mapping[str, Params], grads: Mapping[str, Params], step: int
) -> tuple[State, dict[str, Params]]:
    zeros = {name: Params(*(zeros_like(v.shape, v) for v in p)) for name, p in params.items()}
    return State(zeros, zeros), dict(params)


def _float64(array: NDArray) -> NDArray:
    return np.asarray(array, dtype=np.float64)
