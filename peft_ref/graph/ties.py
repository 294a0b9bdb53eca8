"""Tied weights and the output head of a checkpoint, which stores a shared tensor once: told from config.json and the names.

    encoder and decoder    "shared" is also encoder.embed_tokens and decoder.embed_tokens
    head                   a language model whose head is not in the file shares it with the input embedding

Names of heads: "lm_head" mostly; the BERT family predicts through "cls.predictions.decoder", the RoBERTa family through "lm_head.decoder".
A prefix before all of them is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_ref.graph.protocol import Module, Parameter

HEADS = ("lm_head.decoder", "cls.predictions.decoder", "lm_head", "embed_out", "output_projection", "proj_out", "generator_lm_head")
# Input embeddings by the last part of their names; the first one found is the one that a head shares.
INPUTS = ("shared", "embed_tokens", "wte", "word_embeddings", "embed_in", "tokens_embed", "tok_embeddings", "embeddings")
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "DoubleHeadsModel")


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
        ties |= _head(parameters, source)
    return ties


def _head(parameters: Mapping[str, Parameter], source: str) -> dict[str, str]:
    for marker, head, bias in (
        ("cls.predictions.transform.dense.weight", "cls.predictions.decoder", "cls.predictions.bias"),
        ("lm_head.dense.weight", "lm_head.decoder", "lm_head.bias"),
    ):
        if marker in parameters:
            ties = {f"{head}.weight": source, f"{head}.bias": bias}
            return {second: first for second, first in ties.items() if second not in parameters and first in parameters}
    stored = {f"{name}.weight" for name in HEADS}
    return {} if stored & parameters.keys() else {"lm_head.weight": source}


def head_of(modules: Mapping[str, Module]) -> str | None:
    """The output head, by its name."""
    return next((head for head in HEADS if head in modules and modules[head].kind == "linear"), None)
