"""Multitask prompt tuning: what is asked, and what ports get wrong."""

from __future__ import annotations

from peft_ref.check.mistake import Suite
from peft_ref.check.prompt_family import batch_mistakes, splice_variants
from peft_ref.check.prompting import PromptVariant

PLAIN = {
    "num_virtual_tokens": 3,
    "token_dim": 5,
    "num_transformer_submodules": 1,
    "num_attention_heads": 1,
    "num_layers": 2,
    "num_tasks": 4,
    "num_ranks": 2,
}

VARIANTS = (
    PromptVariant(name="plain", clause="MULTITASKPROMPTTUNING-C1", config=PLAIN, batch=6, task_ids=(2, 0, 2, 3, 1, 3)),
    PromptVariant(
        name="two-sides", clause="MULTITASKPROMPTTUNING-C3", config={**PLAIN, "num_transformer_submodules": 2}, batch=2, task_ids=(3, 1)
    ),
    *splice_variants(PLAIN, "PROMPTTUNING-C6"),
)

SUITE = Suite(variants=(), prompts=VARIANTS, mistakes=batch_mistakes("MULTITASKPROMPTTUNING-C4"))
