"""A whole training of a language model on a row of tokens, with checkpoints.

All randomness after the start, which windows and which dropout masks, comes from one generator that is saved with the rest. So a training
that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from peft_ref.errors import ConfigError, PeftRefError
from peft_ref.nn import schedules
from peft_ref.nn.optim import AdamW
from peft_ref.train import checkpoint
from peft_ref.train.begin import Training
from peft_ref.train.data import Tokens, windows
from peft_ref.train.dropout import with_dropout
from peft_ref.train.step import Recipe, State, begin, step

SCHEDULES = ("constant", "linear", "cosine")


class DivergedError(PeftRefError, ArithmeticError):
    """The loss is no finite number any more."""


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    steps: int = 100
    batch: int = 8  # windows of a micro-batch
    accumulate: int = 1  # micro-batches of a step
    length: int = 64  # tokens of a window
    lr: float = 1e-3
    schedule: str = "linear"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1 is needed.")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule={self.schedule!r}: there are {', '.join(SCHEDULES)}.")
        if not (math.isfinite(self.lr) and self.warmup >= 0 and self.seed >= 0):
            raise ConfigError(f"lr={self.lr}, warmup={self.warmup}, seed={self.seed}: a finite number and two that are not negative.")
        _ = self.recipe()

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.accumulate * self.length

    def recipe(self) -> Recipe:
        cosine = partial(schedules.cosine, warmup=self.warmup, total=self.steps)
        linear = partial(schedules.linear, warmup=self.warmup, total=self.steps)
        flat = partial(schedules.constant_with_warmup, warmup=self.warmup)
        factor = {"cosine": cosine, "linear": linear, "constant": flat}[self.schedule]
        return Recipe(optimizer=AdamW(weight_decay=self.weight_decay), lr=self.lr, factor=factor, max_grad_norm=self.clip)


class Progress(NamedTuple):
    step: int
    loss: float
    tokens_per_second: float
    seconds_left: float


class Finished(NamedTuple):
    state: State
    losses: list[float]
    tokens_per_second: float


def run(
    training: Training,
    plan: Plan,
    tokens: Tokens,
    *,
    tell: Callable[[Progress], None] = lambda progress: None,
    folder: Path | None = None,
    every: int = 0,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Finished:
    """The training to its end. With `every` its checkpoint in `folder` is replaced after so many steps; `resume` begins at it."""
    recipe = plan.recipe()
    said = {**asdict(plan), **(settings or {})}
    now = checkpoint.Saved(begin(recipe, training.params), np.random.default_rng([plan.seed, 1]), [])
    if resume:
        if folder is None or not checkpoint.exists(folder):
            raise ConfigError(f"there is no checkpoint in {folder} to resume from.")
        now = checkpoint.read(folder, now.state, said)
    like = next(iter(training.learner.net.weights.values()))
    first, began = now.state.step, time.perf_counter()
    state, rng, losses = now.state, now.rng, list(now.losses)
    while state.step < plan.steps:
        drawn = [windows(tokens, plan.length, plan.batch, rng, like) for _ in range(plan.accumulate)]
        made = step(training.learner, recipe, state, [with_dropout(training.learner, batch, rng, like) for batch in drawn])
        if not math.isfinite(loss := float(made.loss)):
            raise DivergedError(f"step {made.state.step}: the loss is {loss}.\n  Take a lower lr; the last checkpoint is untouched.")
        state = made.state
        losses.append(loss)
        speed = (state.step - first) / max(time.perf_counter() - began, 1e-9)
        tell(Progress(state.step, loss, speed * plan.tokens, (plan.steps - state.step) / speed))
        if folder is not None and every and state.step % every == 0:
            checkpoint.save(folder, training, checkpoint.Saved(state, rng, losses), said)
    return Finished(state, losses, (state.step - first) * plan.tokens / max(time.perf_counter() - began, 1e-9))
