"""What methods get wrong whose prompt comes out of an encoder, or becomes keys and values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.case import Answer, Case
from peft_ref.check.mistake import Replay, as_if_tensors, only
from peft_ref.check.oracle import answer, float64
from peft_ref.check.prompt_family import as_used, autograd
from peft_ref.check.prompting import PromptProblem, pose_prompt
from peft_ref.prompts import Prompt

CACHE = "past_key_values"


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0 * x)


def without(*parts: str) -> Replay:
    """The tensors whose names contain one of `parts` are left out."""
    return as_if_tensors(lambda key, v, config: np.zeros(v.shape) if any(part in key for part in parts) else v)


def other_gradient(prompt: Callable[[PromptProblem], Array], shows: Callable[[PromptProblem], bool]) -> Replay:
    """The right prompt with a wrong gradient: that of another computation, in which something is constant that should not be."""

    def backward(case: Case) -> Answer | None:
        if not shows(pose_prompt(case, float64)):
            return None
        return autograd(case, as_used(prompt))

    return only(prompt_backward=backward)


def other_cache(cut: Callable[[Prompt, Array], Array], shows: Callable[[Prompt], bool] = lambda method: True) -> Replay:
    """A table made right and cut into keys and values wrongly, wherever it is. A file holds the table, which is right."""

    def replay(case: Case) -> Answer | None:
        p = pose_prompt(case, float64)
        if case.operation == "saved" or not shows(p.method):
            return None
        if case.operation == "splice":
            assert p.prompt is not None
            return {**answer(case), CACHE: cut(p.method, p.prompt)}
        if case.operation == "prompt":
            return {CACHE: cut(p.method, p.method.prompt(p.tensors, p.ctx))}
        return autograd(case, lambda p: cut(p.method, p.method.prompt(p.tensors, p.ctx)))

    return replay
