"""MultitaskPromptTuning: one prompt for all tasks, reweighted for each by a matrix of low rank.

    prompt of task t = P * (U_t V_t)

    P (rows, token_dim)    U (tasks, rows, ranks)    V (tasks, ranks, token_dim)

For a gradient G of the prompt of an example of task t, with H = G * P, summed over the examples of each task:
    dP = sum of G * (U_t V_t) over all    dU_t = H V_t^T    dV_t = U_t^T H.

Paper   Wang et al. 2023, arXiv:2303.02861
HF      peft.MultitaskPromptTuningConfig. P starts as prompt tuning's, U and V normal with deviation 0.02, so the first prompt is small.
        From a source adapter: AVERAGE_SOURCE_TASKS and EXACT_SOURCE_TASK take P and the mean, or one, of its tasks, and need
        num_tasks=1; ONLY_SOURCE_SHARED takes P. Nothing is thrown away: a file holds all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from peft_ref.arrays import Array, namespace, one_hot, to
from peft_ref.errors import ConfigError, KeyMismatchError, ShapeError
from peft_ref.methods.prompt_tuning import check_text, initial_rows
from peft_ref.prompts import EMBEDDING, NO_SOURCES, SAVED, Context, Prompt, Sources, Tensors
from peft_ref.ranges import one_of, positive

COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"
FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
INITS = ("RANDOM", "TEXT", "SAMPLE_VOCAB", *FROM_SOURCE)


@final
@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(Prompt):
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, object] | None = None
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int = 1
    num_tasks: int = 1

    peft_type: ClassVar[str] = "MULTITASK_PROMPT_TUNING"
    tuner_prefix: ClassVar[str] = "multitask_prompt_tuning_"
    file_keys: ClassVar[frozenset[str]] = frozenset({SAVED, COLUMNS, ROWS})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inference_mode:
            one_of(self, "prompt_tuning_init", *INITS)
        check_text(self.prompt_tuning_init, self.prompt_tuning_init_text, self.tokenizer_name_or_path, self.tokenizer_kwargs)
        positive(self, "num_ranks", "num_tasks")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows, dim = self.table_shape
        return {EMBEDDING: (rows, dim), COLUMNS: (self.num_tasks, rows, self.num_ranks), ROWS: (self.num_tasks, self.num_ranks, dim)}

    def init(self, like: Array, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Tensors:
        shapes, init = self.shapes(), self.prompt_tuning_init
        from_words = init in ("TEXT", "SAMPLE_VOCAB") and not self.inference_mode
        shared = initial_rows(init if from_words else "RANDOM", self.prompt_tuning_init_text, self.table_shape, like, rng, sources)
        start = {EMBEDDING: shared, **{name: to(rng.normal(0.0, 0.02, shapes[name]), like) for name in (COLUMNS, ROWS)}}
        if init not in FROM_SOURCE:
            return start
        return self.check({**start, **self._from_source(sources, like)}, where=f"prompt_tuning_init={init}")

    def _from_source(self, sources: Sources, like: Array) -> Tensors:
        init, source = self.prompt_tuning_init, sources.tensors
        needed = (SAVED,) if init == "ONLY_SOURCE_SHARED" else (SAVED, COLUMNS, ROWS)
        if source is None or not set(needed) <= source.keys():
            came = "nothing" if source is None else ", ".join(sorted(source))
            raise KeyMismatchError(
                f"prompt_tuning_init={init!r} starts from another adapter's file, which has {came}.\n"
                f"  Pass Sources(tensors=...) with {', '.join(needed)}."
            )
        xp = namespace(like)
        taken = {EMBEDDING: source[SAVED]}
        for name in needed[1:]:
            of_tasks = source[name]
            if init == "AVERAGE_SOURCE_TASKS":
                taken[name] = xp.mean(of_tasks, axis=0, keepdims=True)
            else:
                task, tasks = self.prompt_tuning_init_task, of_tasks.shape[0]
                if task is None or not -tasks <= task < tasks:
                    raise ConfigError(f"prompt_tuning_init_task={task}: the source adapter has tasks 0 to {tasks - 1}; -1 is the last.")
                taken[name] = of_tasks[task % tasks : task % tasks + 1, :, :]
        return {name: xp.astype(value, like.dtype) for name, value in taken.items()}

    def prompt(self, p: Tensors, ctx: Context) -> Array:
        U, V = self._of_tasks(p, ctx)
        return p[EMBEDDING] * (U @ V)

    def prompt_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors:
        xp = namespace(d)
        U, V = self._of_tasks(p, ctx)
        H = d * p[EMBEDDING]
        examples = xp.matrix_transpose(one_hot(self._task_ids(ctx), self.num_tasks, d))  # (tasks, batch)

        def summed(of_examples: Array) -> Array:
            flat = xp.reshape(of_examples, (of_examples.shape[0], -1))
            return xp.reshape(examples @ flat, (self.num_tasks, *of_examples.shape[1:]))

        return {
            EMBEDDING: xp.sum(d * (U @ V), axis=0),
            COLUMNS: summed(H @ xp.matrix_transpose(V)),
            ROWS: summed(xp.matrix_transpose(U) @ H),
        }

    def saved(self, p: Tensors) -> Tensors:
        return {SAVED: p[EMBEDDING], COLUMNS: p[COLUMNS], ROWS: p[ROWS]}

    def loaded(self, file: Tensors) -> Tensors:
        return self.renamed(file)

    def _of_tasks(self, p: Tensors, ctx: Context) -> tuple[Array, Array]:
        """U (batch, rows, ranks) and V (batch, ranks, token_dim) of every example's task."""
        ids, xp = self._task_ids(ctx), namespace(p[COLUMNS])
        return xp.take(p[COLUMNS], ids, axis=0), xp.take(p[ROWS], ids, axis=0)

    def _task_ids(self, ctx: Context) -> Array:
        ids = ctx.task_ids
        if ids is None:
            raise ConfigError("the prompt of MultitaskPromptTuning is a task's, and task_ids are missing.\n  Give one for every example.")
        if tuple(ids.shape) != (ctx.batch,):
            raise ShapeError(f"MultitaskPromptTuning: task_ids are {tuple(ids.shape)}, expected one for every example, ({ctx.batch},).")
        # Other libraries may not know the numbers yet; NumPy would read -1 as the last task.
        if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < self.num_tasks:
            raise ConfigError(f"MultitaskPromptTuning: task_ids {ids.tolist()}, and there are tasks 0 to {self.num_tasks - 1}.")
        return ids
