"""One step of a training, as a function from a state to the next.

    gradient of the loss  ->  clipped  ->  optimiser, at the rate lr * factor(step)  ->  AdaLoRA's allocator

HF      Trainer's order. It never calls AdaLoRA's allocator: there the user calls `update_and_allocate(step)` after `optimizer.step()`.
        Steps are counted from 1 for it here, so that the last allocation, at total_step - tfinal, comes even where tfinal is 0.
        A table and a head with ensure_weight_tying have their factors in one memory and two parameters, each with its own gradient and
        averages: the optimiser moves the memory by the table's, and from there by the head's. Here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

from peft_ref.arrays import Array
from peft_ref.errors import ConfigError
from peft_ref.methods import adalora_allocator as allocator
from peft_ref.methods.lora import transposed
from peft_ref.nn.optim import SGD, AdamW, clip_by_global_norm, global_norm
from peft_ref.nn.schedules import constant
from peft_ref.train.learner import Batch, Learner, Trainable


@final
@dataclass(frozen=True, kw_only=True)
class Recipe:
    optimizer: AdamW | SGD = field(default_factory=AdamW)
    lr: float = 1e-3
    factor: Callable[[int], float] = constant  # of peft_ref/nn/schedules.py
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if not self.lr >= 0 or (self.max_grad_norm is not None and not self.max_grad_norm > 0):
            raise ConfigError(f"lr={self.lr}, max_grad_norm={self.max_grad_norm}: a rate is not negative, and a norm to clip at positive.")


class State(NamedTuple):
    """All that changes from step to step: a tree."""

    step: int  # how many were made
    params: Trainable
    optimizer: Any
    allocation: allocator.State = allocator.State()


class Stepped(NamedTuple):
    state: State
    loss: Array  # before the step
    norm: Array  # of the gradient, before it was clipped


def begin(recipe: Recipe, params: Trainable) -> State:
    return State(0, params, recipe.optimizer.init(params))


def step(learner: Learner, recipe: Recipe, state: State, batches: Sequence[Batch]) -> Stepped:
    """The state after one step over the micro-batches."""
    start = learner.projected(state.params)
    loss, grads = learner.loss_vjp(start, batches)
    clipped = (grads, global_norm(grads)) if recipe.max_grad_norm is None else clip_by_global_norm(grads, recipe.max_grad_norm)
    optimizer, params = recipe.optimizer.update(state.optimizer, start, clipped[0], recipe.lr * recipe.factor(state.step))
    for head, table in learner.mirrored.items():
        moved = params._replace(adapters={**params.adapters, head: transposed(params.adapters[table])})
        rate = recipe.lr * recipe.factor(state.step)
        twice = recipe.optimizer.update(state.optimizer, moved, clipped[0], rate)[1].adapters[head]
        params = params._replace(adapters={**params.adapters, head: twice, table: transposed(twice)})
    params = learner.left_by_noise(params, start, batches[-1])
    made, allocation = state.step + 1, state.allocation
    if learner.penalty is not None:
        own, moved_by = learner.penalised(params.adapters), learner.penalised(clipped[0].adapters)
        allocation, adapters = allocator.after_step(learner.penalty, allocation, own, moved_by, made)
        params = params._replace(adapters={**params.adapters, **adapters})
    return Stepped(State(made, params, optimizer, allocation), loss, clipped[1])
