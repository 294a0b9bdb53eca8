"""Multitask prompt tuning: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.case import Answer, Case
from peft_ref.check.mistake import Mistake, Replay, Suite, only
from peft_ref.check.oracle import answer
from peft_ref.check.prompt_family import batch_mistakes, other_prompt, other_splice, splice_mistakes, splice_variants
from peft_ref.check.prompting import PromptProblem, PromptVariant
from peft_ref.methods.multitask_prompt_tuning import COLUMNS, ROWS
from peft_ref.prompts import EMBEDDING, SAVED

PLAIN = {
    "num_virtual_tokens": 3,
    "token_dim": 5,
    "num_transformer_submodules": 1,
    "num_attention_heads": 1,
    "num_layers": 2,
    "num_tasks": 4,
    "num_ranks": 2,
}
LARGE = {**PLAIN, "num_virtual_tokens": 7, "token_dim": 11, "num_ranks": 3, "num_tasks": 5}
TWO_SIDES = {**PLAIN, "num_transformer_submodules": 2}

VARIANTS = (
    PromptVariant(name="plain", clause="MULTITASKPROMPTTUNING-C1", config=PLAIN, batch=6, task_ids=(2, 0, 2, 3, 1, 3)),
    PromptVariant(name="rounded", clause="MULTITASKPROMPTTUNING-C1", config=LARGE, numbers="rounded", batch=4, task_ids=(4, 1, 1, 3)),
    PromptVariant(name="two-sides", clause="MULTITASKPROMPTTUNING-C4", config=TWO_SIDES, batch=2, task_ids=(3, 1)),
    # No task twice, where nothing can be overwritten, and one task for all, where no order shows.
    PromptVariant(name="all-tasks-once", clause="MULTITASKPROMPTTUNING-C3", config=PLAIN, batch=4, task_ids=(3, 0, 2, 1)),
    PromptVariant(name="one-task", clause="MULTITASKPROMPTTUNING-C6", config=PLAIN, batch=3, task_ids=(2, 2, 2)),
    *splice_variants(PLAIN, "MULTITASKPROMPTTUNING-C8"),
)


def _ids(p: PromptProblem) -> Array:
    assert p.ctx.task_ids is not None
    return p.ctx.task_ids


def _factors(p: PromptProblem) -> tuple[Array, Array]:
    return p.tensors[COLUMNS][_ids(p)], p.tensors[ROWS][_ids(p)]


def _product(p: PromptProblem) -> Array:
    U, V = _factors(p)
    return U @ V


def _of(prompt: Callable[[PromptProblem], Array]) -> Replay:
    return other_prompt(prompt, lambda p: not np.array_equal(prompt(p), p.method.prompt(p.tensors, p.ctx)), in_file=False)


def _of_tasks(ids: Callable[[Array], Array]) -> Replay:
    return _of(lambda p: p.method.prompt(p.tensors, p.ctx._replace(task_ids=ids(_ids(p)))))


def _reread(name: str) -> Replay:
    def prompt(p: PromptProblem) -> Array:
        tensor = p.tensors[name]
        tasks, first, second = tensor.shape
        return p.method.prompt({**p.tensors, name: tensor.reshape(tasks, second, first).transpose(0, 2, 1)}, p.ctx)

    return _of(prompt)


def _mixed(p: PromptProblem) -> Array:
    U, _ = _factors(p)
    return p.tensors[EMBEDDING] * (U @ p.tensors[ROWS][np.roll(_ids(p), 1)])


def _mean_of_tasks(p: PromptProblem) -> Array:
    n = p.method.shapes()[COLUMNS][0]
    whole = sum(p.tensors[COLUMNS][t] @ p.tensors[ROWS][t] for t in range(n)) / n
    return np.stack([p.tensors[EMBEDDING] * whole] * p.ctx.batch)


def _first_rank(p: PromptProblem) -> Array:
    U, V = _factors(p)
    return p.tensors[EMBEDDING] * (U[:, :, :1] @ V[:, :1, :])


def _shared_gradient(case: Case) -> Answer:
    """dP as if the prompt were P alone."""
    assert case.dy is not None
    return {**answer(case), f"0.{EMBEDDING}": case.dy.sum(axis=0)}


def _last_of_each_task(case: Case) -> Answer | None:
    """dU[ids] = ... of each example, where the last one of a task wins."""
    assert case.dy is not None
    ids = case.question["task_ids"].tolist()
    last = [n for n, task in enumerate(ids) if task not in ids[n + 1 :]]
    if len(last) == len(ids):
        return None
    dy = np.zeros_like(case.dy)
    dy[last] = case.dy[last]
    return {**answer(replace(case, dy=dy)), f"0.{EMBEDDING}": answer(case)[f"0.{EMBEDDING}"]}


def _saved_prompt(case: Case) -> Answer:
    """The first task's prompt where the table of all tasks belongs."""
    tensors = case.adapters[0].tensors
    return {**answer(case), SAVED: tensors[EMBEDDING] * (tensors[COLUMNS][0] @ tensors[ROWS][0])}


def _on_decoder(rows: Callable[[Array, int], tuple[Array, Array]]) -> Replay:
    """Other rows of the prompt before encoder and decoder."""

    def change(p: PromptProblem, right: Answer) -> Answer | None:
        n = p.method.size("num_virtual_tokens")
        if p.prompt is None or "decoder_embeddings" not in right:
            return None
        sides = dict(zip(("embeddings", "decoder_embeddings"), rows(p.prompt, n), strict=True))
        return {**right, **{k: np.concatenate([v, right[k][:, n:]], axis=1) for k, v in sides.items()}}

    return other_splice(change)


SUITE = Suite(
    variants=(),
    prompts=VARIANTS,
    mistakes=(
        Mistake(
            name="task-added",
            clause="MULTITASKPROMPTTUNING-C1",
            sentence="the task's matrix is added to the shared prompt instead of multiplied into it",
            replay=_of(lambda p: p.tensors[EMBEDDING] + _product(p)),
        ),
        Mistake(
            name="one-plus-task",
            clause="MULTITASKPROMPTTUNING-C1",
            sentence="the shared prompt is multiplied by 1 + U V instead of U V",
            replay=_of(lambda p: p.tensors[EMBEDDING] * (_product(p) + 1.0)),
        ),
        Mistake(
            name="shared-prompt-left-out",
            clause="MULTITASKPROMPTTUNING-C1",
            sentence="the prompt is U V alone, without the shared table",
            replay=_of(_product),
        ),
        Mistake(
            name="task-left-out",
            clause="MULTITASKPROMPTTUNING-C1",
            sentence="the prompt is the shared table alone, without its task",
            replay=_of(lambda p: np.stack([p.tensors[EMBEDDING]] * p.ctx.batch)),
        ),
        Mistake(
            name="ranks-averaged",
            clause="MULTITASKPROMPTTUNING-C2",
            sentence="U V is divided by num_ranks",
            replay=_of(lambda p: p.tensors[EMBEDDING] * (_product(p) / p.tensors[ROWS].shape[1])),
        ),
        Mistake(
            name="first-rank-only",
            clause="MULTITASKPROMPTTUNING-C2",
            sentence="only the first of the ranks is read",
            replay=_of(_first_rank),
        ),
        Mistake(
            name="columns-transposed",
            clause="MULTITASKPROMPTTUNING-C2",
            sentence="the numbers of prefix_task_cols are read as (tasks, ranks, rows) instead of (tasks, rows, ranks)",
            replay=_reread(COLUMNS),
        ),
        Mistake(
            name="rows-transposed",
            clause="MULTITASKPROMPTTUNING-C2",
            sentence="the numbers of prefix_task_rows are read as (tasks, token_dim, ranks) instead of (tasks, ranks, token_dim)",
            replay=_reread(ROWS),
        ),
        Mistake(
            name="first-task-for-all",
            clause="MULTITASKPROMPTTUNING-C3",
            sentence="every example is taken to be of task 0",
            replay=_of_tasks(np.zeros_like),
        ),
        Mistake(
            name="first-examples-task-for-all",
            clause="MULTITASKPROMPTTUNING-C3",
            sentence="every example is taken to be of the first example's task",
            replay=_of_tasks(lambda ids: np.full_like(ids, ids[0])),
        ),
        Mistake(
            name="tasks-reversed",
            clause="MULTITASKPROMPTTUNING-C3",
            sentence="the examples get their tasks in reverse order",
            replay=_of_tasks(lambda ids: ids[::-1]),
        ),
        Mistake(
            name="tasks-sorted",
            clause="MULTITASKPROMPTTUNING-C3",
            sentence="the examples are grouped by task and not put back into their order",
            replay=_of_tasks(np.sort),
        ),
        Mistake(
            name="tasks-mixed",
            clause="MULTITASKPROMPTTUNING-C3",
            sentence="U is of the example's task and V of the task of the example before it",
            replay=_of(_mixed),
        ),
        Mistake(
            name="tasks-averaged",
            clause="MULTITASKPROMPTTUNING-C3",
            sentence="every example gets the mean over all tasks",
            replay=_of(_mean_of_tasks),
        ),
        Mistake(
            name="shared-gradient-without-task",
            clause="MULTITASKPROMPTTUNING-C5",
            sentence="the shared table's gradient lacks the factor U V",
            replay=only(prompt_backward=_shared_gradient),
        ),
        Mistake(
            name="same-task-overwritten",
            clause="MULTITASKPROMPTTUNING-C6",
            sentence="of several examples of one task only the last one's gradient reaches U and V",
            replay=only(prompt_backward=_last_of_each_task),
        ),
        Mistake(
            name="saved-with-task",
            clause="MULTITASKPROMPTTUNING-C7",
            sentence="the file's prompt_embeddings are task 0's prompt instead of the shared table",
            replay=only(saved=_saved_prompt),
        ),
        Mistake(
            name="decoder-gets-encoders-rows",
            clause="MULTITASKPROMPTTUNING-C9",
            sentence="the encoder's rows go before the decoder's embeddings too",
            replay=_on_decoder(lambda prompt, n: (prompt[:, :n], prompt[:, :n])),
        ),
        Mistake(
            name="encoder-gets-decoders-rows",
            clause="MULTITASKPROMPTTUNING-C9",
            sentence="the decoder's rows go before the encoder's embeddings too",
            replay=_on_decoder(lambda prompt, n: (prompt[:, n:], prompt[:, n:])),
        ),
        Mistake(
            name="sides-swapped",
            clause="MULTITASKPROMPTTUNING-C9",
            sentence="the first half of the rows goes to the decoder and the second to the encoder",
            replay=_on_decoder(lambda prompt, n: (prompt[:, n:], prompt[:, :n])),
        ),
        *batch_mistakes("MULTITASKPROMPTTUNING-C6"),
        *splice_mistakes(),
    ),
)
