"""P-tuning: what is asked, and what ports get wrong."""

from __future__ import annotations

from peft_ref.check.mistake import Suite
from peft_ref.check.prompt_family import batch_mistakes, splice_variants
from peft_ref.check.prompting import PromptVariant

SIZES = {"num_transformer_submodules": 1, "num_attention_heads": 1, "num_layers": 2}
MLP = {**SIZES, "num_virtual_tokens": 3, "token_dim": 5, "encoder_hidden_size": 7}
LSTM = {**SIZES, "num_virtual_tokens": 3, "token_dim": 5, "encoder_hidden_size": 2, "encoder_reparameterization_type": "LSTM"}

VARIANTS = (
    PromptVariant(name="mlp", clause="PTUNING-C1", config=MLP),
    PromptVariant(name="mlp-two-sides", clause="PTUNING-C1", config={**MLP, "num_transformer_submodules": 2}),
    PromptVariant(name="lstm", clause="PTUNING-C5", config={**LSTM, "encoder_num_layers": 1}),
    PromptVariant(name="lstm-two-layers", clause="PTUNING-C5", config=LSTM),
    PromptVariant(
        name="lstm-dropout",
        clause="PTUNING-C9",
        config={**LSTM, "encoder_dropout": 0.75},
        operations=("prompt", "prompt_backward"),
        dropout=True,
    ),
    PromptVariant(name="inference", clause="PTUNING-C10", config={**MLP, "inference_mode": True}),
    *splice_variants(MLP, "PROMPTTUNING-C6"),
)

SUITE = Suite(variants=(), prompts=VARIANTS, mistakes=batch_mistakes("PTUNING-C12"))
