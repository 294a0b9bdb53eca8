"""What methods get wrong whose prompt comes out of an encoder, or becomes keys and values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import tape
from peft_ref.check.case import Answer, Case
from peft_ref.check.mistake import Replay, as_if_tensors, only
from peft_ref.check.oracle import answer, float64
from peft_ref.check.prompting import PromptProblem, pose_prompt, used
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
        return autograd(case, lambda p: next(iter(used(p.method, prompt(p)).values())))

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


def autograd(case: Case, output: Callable[[PromptProblem], Array]) -> Answer:
    """What an autograd engine returns for a wrong prompt, in the shape in which a model takes it."""
    p = pose_prompt(case, tape.tape_array)
    assert case.dy is not None
    tape.backward(output(p), case.dy)
    return {f"0.{name}": tape.gradients(value) for name, value in p.tensors.items()}
