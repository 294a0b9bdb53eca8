"""Small models for every task under PEFT's prompts, and random configurations for them, as PEFT's own objects take them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft_ref.prompts import Context, Prompt  # noqa: E402
from peft_ref.splice import key_values  # noqa: E402

SIZES = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 13}
BART = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


def _llama(**changes: Any) -> Any:
    return transformers.LlamaConfig(**SIZES, pad_token_id=0, **changes)


MODELS: dict[str, tuple[Callable[[], Any], ...]] = {
    "CAUSAL_LM": (
        lambda: transformers.LlamaForCausalLM(_llama(num_key_value_heads=2)),
        lambda: transformers.LlamaForCausalLM(_llama(head_dim=6, num_key_value_heads=1)),
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=13, n_positions=16)),
    ),
    "SEQ_2_SEQ_LM": (
        lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(**BART, vocab_size=13, encoder_ffn_dim=6, decoder_ffn_dim=6, max_position_embeddings=16)
        ),
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=8, d_kv=4, d_ff=6, num_layers=3, num_heads=2, vocab_size=13)
        ),
    ),
    "SEQ_CLS": (
        lambda: transformers.LlamaForSequenceClassification(_llama(num_key_value_heads=2)),
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)),
    ),
    "TOKEN_CLS": (lambda: transformers.BertForTokenClassification(transformers.BertConfig(**SIZES)),),
    "QUESTION_ANS": (lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES)),),
    "FEATURE_EXTRACTION": (lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),),
}
PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE", "CPT")
ONLY = {"CPT": "CAUSAL_LM"}
PAIRS = [(kind, task) for kind in PROMPTS for task in MODELS if ONLY.get(kind, task) == task]


@cache
def _made(task: str, which: int) -> Any:
    torch.manual_seed(0)
    return MODELS[task][which]()


def base(task: str, which: int = 0) -> Any:
    """A fresh copy of a model: PEFT changes what it is put on."""
    return copy.deepcopy(_made(task, which))


def random_prompt(rng: np.random.Generator, kind: str, task: str) -> dict[str, Any]:
    """A configuration that PEFT accepts on a model of the task."""

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    saved = {"CAUSAL_LM": ["lm_head"], "SEQ_2_SEQ_LM": ["final_layer_norm"], "FEATURE_EXTRACTION": ["dense"]}.get(
        task, ["LayerNorm", "norm"]
    )
    own: dict[str, Any] = {
        "PROMPT_TUNING": {"prompt_tuning_init": pick("RANDOM", "SAMPLE_VOCAB")},
        "PREFIX_TUNING": {
            "prefix_projection": bool(rng.integers(2)),
            "encoder_hidden_size": pick(None, 5),
            "init_weights": pick(None, "zero"),
        },
        "P_TUNING": {
            # as PEFT's own words: as text, "MLP" with another number of layers than 2 is an error of PEFT's when it warns of it
            "encoder_reparameterization_type": pick(*peft.PromptEncoderReparameterizationType),
            "encoder_hidden_size": pick(None, 5),
            "encoder_num_layers": pick(1, 2, 3),
            "encoder_dropout": pick(0.0, 0.1),
        },
        "MULTITASK_PROMPT_TUNING": {"num_tasks": pick(1, 2, 3), "num_ranks": pick(1, 2)},
        "CARTRIDGE": {"num_frozen_tokens": pick(0, 1)},
        "CPT": {},
    }[kind]
    tokens = int(rng.integers(1, 6))
    if kind == "CPT":
        types = rng.integers(-1, 9, tokens).tolist()
        own = {
            "cpt_token_ids": rng.integers(0, 13, tokens).tolist(),
            "cpt_tokens_type_mask": pick(None, types),
            "opt_weighted_loss_type": pick("none", "decay"),
            "opt_projection_epsilon": pick(0.1, 30.0),
        }
    return {
        "peft_type": kind,
        "task_type": task,
        "num_virtual_tokens": tokens,
        "num_transformer_submodules": pick(None, None, 1, 2) if kind not in ("PREFIX_TUNING", "CARTRIDGE", "CPT") else None,
        "modules_to_save": pick(None, None, saved),
        **own,
    }


def prompted(data: dict[str, Any], model: Any, seed: int) -> Any:
    """The model under PEFT, everything that is trained random, in no place zero."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.PeftConfig.from_peft_type(**copy.deepcopy(data)))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return wrapped.eval()


def peft_s_prompt(wrapped: Any, batch: int, task_ids: list[int] | None = None) -> np.ndarray[Any, Any]:
    """The prompt that PEFT gives its model; keys and values as (layers, 2, batch, heads, n, head_dim)."""
    with torch.no_grad():
        prompt = wrapped.get_prompt(batch, None if task_ids is None else torch.tensor(task_ids))
    if isinstance(prompt, torch.Tensor):
        return prompt.numpy()
    cache_ = getattr(prompt, "self_attention_cache", prompt)
    return np.stack([np.stack([layer.keys.numpy(), layer.values.numpy()]) for layer in cache_.layers])


def our_prompt(method: Prompt, tensors: Any, batch: int, task_ids: list[int] | None = None) -> Any:
    prompt = method.prompt(tensors, Context(batch, None if task_ids is None else np.asarray(task_ids)))
    return key_values(method, prompt) if method.place == "cache" else prompt
