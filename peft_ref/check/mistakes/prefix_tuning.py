"""Prefix tuning: what is asked, and what ports get wrong."""

from __future__ import annotations

from peft_ref.check.mistake import Suite
from peft_ref.check.prompt_family import batch_mistakes, splice_variants
from peft_ref.check.prompting import PromptVariant

PLAIN = {"num_virtual_tokens": 3, "token_dim": 10, "num_transformer_submodules": 1, "num_attention_heads": 5, "num_layers": 4}
TWO_SIDES = {**PLAIN, "num_transformer_submodules": 2}
PROJECTED = {**PLAIN, "num_layers": 2, "token_dim": 6, "num_attention_heads": 3, "prefix_projection": True, "encoder_hidden_size": 5}

VARIANTS = (
    PromptVariant(name="plain", clause="PREFIXTUNING-C1", config=PLAIN),
    PromptVariant(name="two-sides", clause="PREFIXTUNING-C5", config=TWO_SIDES, operations=("prompt", "prompt_backward")),
    PromptVariant(name="projected", clause="PREFIXTUNING-C2", config=PROJECTED),
    PromptVariant(name="inference", clause="PREFIXTUNING-C3", config={**PROJECTED, "inference_mode": True}),
    *splice_variants(PLAIN, "PREFIXTUNING-C8"),
)

SUITE = Suite(variants=(), prompts=VARIANTS, mistakes=batch_mistakes("PREFIXTUNING-C10"))
