"""Prompt tuning: what is asked, and what ports get wrong."""

from __future__ import annotations

import math

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check.case import Answer
from peft_ref.check.mistake import Mistake, Suite
from peft_ref.check.prompt_family import batch_mistakes, other_prompt, other_splice, splice_mistakes, splice_variants
from peft_ref.check.prompting import PromptProblem, PromptVariant
from peft_ref.prompts import EMBEDDING

PLAIN = {"num_virtual_tokens": 3, "token_dim": 5, "num_transformer_submodules": 1, "num_attention_heads": 1, "num_layers": 2}
TWO_SIDES = {**PLAIN, "num_transformer_submodules": 2}
LARGE = {**PLAIN, "num_virtual_tokens": 7, "token_dim": 11}

VARIANTS = (
    PromptVariant(name="plain", clause="PROMPTTUNING-C1", config=PLAIN),
    PromptVariant(name="rounded", clause="PROMPTTUNING-C1", config=LARGE, numbers="rounded", batch=4),
    PromptVariant(name="two-sides", clause="PROMPTTUNING-C3", config=TWO_SIDES),
    # One example alone: no mean and no first example can be told from the sum here.
    PromptVariant(name="one-example", clause="PROMPTTUNING-C4", config=PLAIN, operations=("prompt_backward",), batch=1),
    # A saved adapter: what its start says has no meaning any more.
    PromptVariant(
        name="inference", clause="PROMPTTUNING-C5", config={**PLAIN, "inference_mode": True, "prompt_tuning_init": "SAMPLE_VOCAB"}
    ),
    *splice_variants(PLAIN, "PROMPTTUNING-C6"),
    PromptVariant(
        name="splice-encoder-decoder-half",
        clause="PROMPTTUNING-C7",
        config=PLAIN,
        operations=("splice",),
        task_type="SEQ_2_SEQ_LM",
        inputs=("attention_mask", "labels"),
    ),
)


def _scaled(p: PromptProblem) -> Array:
    return p.method.prompt(p.tensors, p.ctx) * math.sqrt(p.method.size("token_dim"))


def _reread(p: PromptProblem) -> Array:
    E = p.tensors[EMBEDDING]
    return p.method.prompt({EMBEDDING: E.reshape(E.shape[::-1]).T}, p.ctx)


def _reversed(p: PromptProblem) -> Array:
    return p.method.prompt(p.tensors, p.ctx)[:, ::-1, :]


def _first_row(p: PromptProblem) -> Array:
    rows = p.tensors[EMBEDDING][[0] * p.method.table_shape[0]]
    return p.method.prompt({EMBEDDING: rows}, p.ctx)


def _interleaved(p: PromptProblem) -> Array:
    n, width = p.method.size("num_virtual_tokens"), p.method.size("token_dim")
    E = p.tensors[EMBEDDING].reshape(n, 2, width)
    return p.method.prompt({EMBEDDING: np.concatenate([E[:, 0], E[:, 1]])}, p.ctx)


def _swapped(p: PromptProblem) -> Array:
    n, prompt = p.method.size("num_virtual_tokens"), p.method.prompt(p.tensors, p.ctx)
    return np.concatenate([prompt[:, n:], prompt[:, :n]], axis=1)


def _two_sided(p: PromptProblem) -> bool:
    return p.method.size("num_transformer_submodules") == 2


def _second_half(p: PromptProblem, right: Answer) -> Answer | None:
    n = p.method.size("num_virtual_tokens")
    if p.prompt is None or p.prompt.shape[1] == n:
        return None
    wrong = right["embeddings"].copy()
    wrong[:, :n] = p.prompt[:, n:]
    return {**right, "embeddings": wrong}


SUITE = Suite(
    variants=(),
    prompts=VARIANTS,
    mistakes=(
        Mistake(
            name="prompt-scaled",
            clause="PROMPTTUNING-C2",
            sentence="the virtual tokens are multiplied by sqrt(token_dim), as some models do with their words",
            replay=other_prompt(_scaled, in_file=False),
        ),
        Mistake(
            name="table-transposed",
            clause="PROMPTTUNING-C1",
            sentence="the table's numbers are read as (token_dim, rows) instead of (rows, token_dim)",
            replay=other_prompt(_reread, in_file=False),
        ),
        Mistake(
            name="tokens-reversed",
            clause="PROMPTTUNING-C1",
            sentence="the virtual tokens come in reverse order",
            replay=other_prompt(_reversed, in_file=False),
        ),
        Mistake(
            name="first-row-for-all",
            clause="PROMPTTUNING-C1",
            sentence="every virtual token is the table's first row",
            replay=other_prompt(_first_row, in_file=False),
        ),
        Mistake(
            name="sides-interleaved",
            clause="PROMPTTUNING-C3",
            sentence="the table's rows go to encoder and decoder in turn instead of half and half",
            replay=other_prompt(_interleaved, _two_sided, in_file=False),
        ),
        Mistake(
            name="sides-swapped",
            clause="PROMPTTUNING-C3",
            sentence="the table's second half comes first",
            replay=other_prompt(_swapped, _two_sided, in_file=False),
        ),
        Mistake(
            name="decoder-half-used",
            clause="PROMPTTUNING-C7",
            sentence="the encoder gets the second half of the rows, which nothing uses, instead of the first",
            replay=other_splice(_second_half),
        ),
        *batch_mistakes("PROMPTTUNING-C4"),
        *splice_mistakes(),
    ),
)
