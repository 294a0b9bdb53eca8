"""Prompt tuning: what is asked, and what ports get wrong."""

from __future__ import annotations

import math

from peft_ref.arrays import Array
from peft_ref.check.case import Answer
from peft_ref.check.mistake import Mistake, Suite
from peft_ref.check.prompt_family import batch_mistakes, other_prompt, other_splice, splice_mistakes, splice_variants
from peft_ref.check.prompting import PromptProblem, PromptVariant
from peft_ref.prompts import EMBEDDING

PLAIN = {"num_virtual_tokens": 3, "token_dim": 5, "num_transformer_submodules": 1, "num_attention_heads": 1, "num_layers": 2}
TWO_SIDES = {**PLAIN, "num_transformer_submodules": 2}

VARIANTS = (
    PromptVariant(name="plain", clause="PROMPTTUNING-C1", config=PLAIN),
    PromptVariant(
        name="rounded", clause="PROMPTTUNING-C1", config={**PLAIN, "num_virtual_tokens": 7, "token_dim": 11}, numbers="rounded", batch=4
    ),
    PromptVariant(name="two-sides", clause="PROMPTTUNING-C3", config=TWO_SIDES),
    *splice_variants(PLAIN, "PROMPTTUNING-C6"),
)


def _scaled(p: PromptProblem) -> Array:
    return p.method.prompt(p.tensors, p.ctx) * math.sqrt(p.method.size("token_dim"))


def _reread(p: PromptProblem) -> Array:
    E = p.tensors[EMBEDDING]
    return p.method.prompt({EMBEDDING: E.reshape(E.shape[::-1]).T}, p.ctx)


def _reversed(p: PromptProblem) -> Array:
    return p.method.prompt(p.tensors, p.ctx)[:, ::-1, :]


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
            replay=other_prompt(_scaled),
        ),
        Mistake(
            name="table-transposed",
            clause="PROMPTTUNING-C1",
            sentence="the table's numbers are read as (token_dim, rows) instead of (rows, token_dim)",
            replay=other_prompt(_reread),
        ),
        Mistake(
            name="tokens-reversed",
            clause="PROMPTTUNING-C1",
            sentence="the virtual tokens come in reverse order",
            replay=other_prompt(_reversed),
        ),
        Mistake(
            name="decoder-half-used",
            clause="PROMPTTUNING-C7",
            sentence="the encoder gets the second half of the rows, which nothing uses, instead of the first",
            replay=other_splice(_second_half),
        ),
        *batch_mistakes("PROMPTTUNING-C4"),
        *splice_mistakes(
            {"embeddings": "PROMPTTUNING-C6", "mask": "PROMPTTUNING-C8", "labels": "PROMPTTUNING-C9", "types": "PROMPTTUNING-C11"}
        ),
    ),
)
