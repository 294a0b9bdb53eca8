"""Prefix tuning: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import tape
from peft_ref.check.cache_family import cache_splice_mistakes, row_mistakes
from peft_ref.check.encoder_family import other_gradient, relu, without
from peft_ref.check.mistake import Mistake, Suite, reread
from peft_ref.check.prompt_family import batch_mistakes, other_prompt, splice_variants
from peft_ref.check.prompting import PromptProblem, PromptVariant
from peft_ref.prompts import EMBEDDING

PLAIN = {"num_virtual_tokens": 3, "token_dim": 10, "num_transformer_submodules": 1, "num_attention_heads": 5, "num_layers": 4}
TWO_SIDES = {**PLAIN, "num_transformer_submodules": 2}
PROJECTED = {**PLAIN, "num_layers": 2, "token_dim": 6, "num_attention_heads": 3, "prefix_projection": True, "encoder_hidden_size": 7}

VARIANTS = (
    PromptVariant(name="plain", clause="PREFIXTUNING-C1", config=PLAIN),
    PromptVariant(name="two-sides", clause="PREFIXTUNING-C9", config=TWO_SIDES, operations=("prompt", "prompt_backward")),
    PromptVariant(
        name="two-sides-odd", clause="PREFIXTUNING-C10", config={**TWO_SIDES, "num_layers": 3}, operations=("prompt", "prompt_backward")
    ),
    PromptVariant(name="projected", clause="PREFIXTUNING-C2", config=PROJECTED),
    PromptVariant(name="inference", clause="PREFIXTUNING-C3", config={**PROJECTED, "inference_mode": True}),
    # One token, one head, one example: what mixes them up does not show.
    PromptVariant(
        name="one-of-each",
        clause="PREFIXTUNING-C4",
        config={**PLAIN, "num_virtual_tokens": 1, "num_attention_heads": 1, "num_layers": 3},
        operations=("prompt", "prompt_backward"),
        batch=1,
    ),
    *splice_variants(PLAIN, "PREFIXTUNING-C11"),
)


# ---- the encoder


def _projected(activation: Callable[[Array], Array], at_end: Callable[[Array], Array] = lambda table: table) -> Callable[..., Array]:
    def prompt(p: PromptProblem) -> Array:
        E, t = p.tensors[EMBEDDING], p.tensors
        H = activation(E @ t["transform.0.weight"].T + t["transform.0.bias"])
        table = at_end(H @ t["transform.2.weight"].T + t["transform.2.bias"])
        return np.broadcast_to(table, (p.ctx.batch, *table.shape))

    return prompt


def _projects(p: PromptProblem) -> bool:
    return "transform.0.weight" in p.tensors


def _straight_through(x: Array) -> Array:
    """tanh, whose gradient is taken for 1."""
    return x + (tape.constant(np.tanh(x)) - tape.constant(x))


SUITE = Suite(
    variants=(),
    prompts=VARIANTS,
    mistakes=(
        *row_mistakes(),
        Mistake(
            name="tanh-missing",
            clause="PREFIXTUNING-C2",
            sentence="the projection has no tanh between its two layers",
            replay=other_prompt(_projected(lambda x: x), _projects),
        ),
        Mistake(
            name="relu-for-tanh",
            clause="PREFIXTUNING-C2",
            sentence="the projection has relu in place of tanh",
            replay=other_prompt(_projected(relu), _projects),
        ),
        Mistake(
            name="tanh-at-end",
            clause="PREFIXTUNING-C2",
            sentence="the projection has a second tanh, after its last layer",
            replay=other_prompt(_projected(np.tanh, np.tanh), _projects),
        ),
        Mistake(
            name="first-bias-missing",
            clause="PREFIXTUNING-C2",
            sentence="the projection's first layer has no bias",
            replay=without("transform.0.bias"),
        ),
        Mistake(
            name="second-bias-missing",
            clause="PREFIXTUNING-C2",
            sentence="the projection's second layer has no bias",
            replay=without("transform.2.bias"),
        ),
        Mistake(
            name="first-weight-transposed",
            clause="PREFIXTUNING-C2",
            sentence="the numbers of transform.0.weight are read as (dim, hidden) instead of (hidden, dim)",
            replay=reread("transform.0.weight"),
        ),
        Mistake(
            name="second-weight-transposed",
            clause="PREFIXTUNING-C2",
            sentence="the numbers of transform.2.weight are read as (hidden, columns) instead of (columns, hidden)",
            replay=reread("transform.2.weight"),
        ),
        Mistake(
            name="tanh-gradient-missing",
            clause="PREFIXTUNING-C13",
            sentence="the gradient passes tanh unchanged, without the factor 1 - H^2",
            replay=other_gradient(_projected(_straight_through), _projects),
        ),
        *batch_mistakes("PREFIXTUNING-C14"),
        *cache_splice_mistakes(),
    ),
)
