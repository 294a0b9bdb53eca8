"""Tied weights and the output head of a checkpoint, which stores a shared tensor once: told from config.json and the names.

    encoder and decoder    "shared" is also encoder.embed_tokens and decoder.embed_tokens
    head                   a language model whose head is not in the file shares it with the input embedding

Names of heads: "lm_head" mostly; the BERT family predicts through "cls.predictions.decoder", the RoBERTa family through "lm_head.decoder".
A prefix before all of them is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_ref.graph.protocol import Module, Parameter

# Heads by architecture, where the head is not "lm_head".
HEAD_OF = MappingProxyType(
    {
        "albert": "predictions.decoder",
        "bert-generation": "lm_head.decoder",
        "distilbert": "vocab_projector",
        "xlnet": "lm_loss",
        "convbert": "generator_lm_head",
        "electra": "generator_lm_head",
        "flaubert": "pred_layer.proj",
        "xlm": "pred_layer.proj",
        "modernbert": "decoder",
        "modernbert-decoder": "decoder",
        "biogpt": "output_projection",
        "trocr": "output_projection",
        "gpt_neox_japanese": "embed_out",
        "whisper": "proj_out",
        "rwkv": "head",
        "git": "output",
    }
)
# Any other architecture: the first of these that is there.
HEADS = ("lm_head.decoder", "cls.predictions.decoder", "lm_head", "embed_out", "output_projection", "proj_out", "generator_lm_head")
# Input embeddings by the last part of their names; the first one found is the one that a head shares.
INPUTS = (
    "shared",
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embed_in",
    "tokens_embed",
    "tok_embeddings",
    "embeddings",
    "word_embedding",
    "w",
)
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "DoubleHeadsModel", "MTModel")
WITH_HEAD = (*_WITH_HEAD, "BertGenerationDecoder")


def tied_parameters(parameters: Mapping[str, Parameter], config: Mapping[str, Any]) -> dict[str, str]:
    """The second names of stored tensors, each with the name it is stored under."""
    source = next((name for last in INPUTS for name in parameters if f".{name}".endswith(f".{last}.weight")), None)
    if source is None or config.get("tie_word_embeddings") is False:
        return {}
    ties: dict[str, str] = {}
    before, last = source.removesuffix(".weight").rpartition(".")[::2]
    if last == "shared":
        dot = f"{before}." if before else ""
        seconds = (f"{dot}{half}.embed_tokens.weight" for half in ("encoder", "decoder"))
        holders = {name.removeprefix(dot).partition(".")[0] for name in parameters}
        ties |= {s: source for s in seconds if s not in parameters and s.removeprefix(dot).partition(".")[0] in holders}
    if any(str(a).endswith(WITH_HEAD) for a in config.get("architectures") or ()):
        ties |= _head(parameters, str(config.get("model_type", "")), source)
    return ties


def _head(parameters: Mapping[str, Parameter], model_type: str, source: str) -> dict[str, str]:
    head = HEAD_OF.get(model_type)
    if head is None and "cls.predictions.transform.dense.weight" in parameters:
        head = "cls.predictions.decoder"
    if head is None and "lm_head.dense.weight" in parameters:
        head = "lm_head.decoder"
    if head is None and any(f"{name}.weight" in parameters for name in HEADS):
        return {}
    head = head or "lm_head"
    # The BERT and RoBERTa families store the bias one level higher.
    ties = {f"{head}.weight": source, f"{head}.bias": f"{head.rpartition('.')[0]}.bias"}
    return {second: first for second, first in ties.items() if second not in parameters and first in parameters}


def head_of(modules: Mapping[str, Module], model_type: str) -> str | None:
    """The output head, by its name."""
    names = (HEAD_OF[model_type],) if model_type in HEAD_OF else HEADS
    return next((head for head in names if head in modules and modules[head].kind == "linear"), None)
