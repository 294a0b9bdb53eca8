"""Tiny random models to match against, and what HF PEFT does with one."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any, NamedTuple

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

transformers.logging.set_verbosity_error()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.xq_proj = nn.Linear(4, 4)
        self.q_proj1 = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(2, 6, 4))
        self.down = nn.Parameter(torch.zeros(2, 4, 3))
        self.bias = nn.Parameter(torch.zeros(2))


class Traps(nn.Module):
    """Names that look alike: q_proj and xq_proj, layers.1 and layers.11, numbers in and out of place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(12))
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(12))
        self.model.h2 = nn.ModuleDict({"3": nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])})})
        self.model.moe = Experts()
        self.q_proj = nn.Linear(4, 4)
        self.emb = nn.Embedding(5, 4)
        self.lm_head = nn.Linear(4, 5)
        self.head = Conv1D(3, 4)


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, (3, 2), stride=(1, 2), padding=(1, 0), dilation=1, groups=2),
            nn.Conv2d(8, 8, 3, padding="same"),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 2, padding="same"),
            nn.Conv2d(8, 8, 1, padding_mode="reflect"),
        )
        self.c3 = nn.Conv3d(2, 4, 2, dilation=2)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.fc = nn.Linear(8, 3)


def _small(config: Any, cls: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(config).eval()


_LLAMA = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
_BERT = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BUILDERS = {
    "llama": lambda: _small(transformers.LlamaConfig(num_hidden_layers=3, **_LLAMA), transformers.LlamaForCausalLM),
    "llama-tied": lambda: _small(
        transformers.LlamaConfig(num_hidden_layers=1, tie_word_embeddings=True, **_LLAMA), transformers.LlamaForCausalLM
    ),
    "llama-classifier": lambda: _small(
        transformers.LlamaConfig(num_hidden_layers=1, **_LLAMA), transformers.LlamaForSequenceClassification
    ),
    "gpt2": lambda: _small(transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, **_TOKENS), transformers.GPT2LMHeadModel),
    "bert": lambda: _small(transformers.BertConfig(**_BERT), transformers.BertForMaskedLM),
    "bert-classifier": lambda: _small(transformers.BertConfig(**_BERT), transformers.BertForSequenceClassification),
    "bert-tokens": lambda: _small(transformers.BertConfig(**_BERT), transformers.BertForTokenClassification),
    "roberta-classifier": lambda: _small(transformers.RobertaConfig(**_BERT), transformers.RobertaForSequenceClassification),
    "t5": lambda: _small(
        transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2), transformers.T5ForConditionalGeneration
    ),
    "traps": Traps,
    "convs": Convs,
}


@cache
def model(name: str) -> Any:
    """Shared: do not change it."""
    return BUILDERS[name]()


class Answer(NamedTuple):
    modules: frozenset[str]
    saved: frozenset[str]
    parameters: frozenset[str]


def ask_peft(name: str, config: Any) -> Answer:
    """What PEFT wraps, by looking at the wrapped model. Raises as PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model(name)), config)
    inner = wrapped.base_model.model
    modules, saved, parameters = set(), set(), set()
    for path, module in inner.named_modules():
        plain = path.replace(".base_layer", "").replace(".modules_to_save.default", "").replace(".original_module", "")
        if type(module).__name__ == "ParamWrapper":
            parameters.add(f"{plain}.{module.parameter_name}")
        elif isinstance(module, BaseTunerLayer):
            modules.add(plain)
        elif isinstance(module, ModulesToSaveWrapper):
            saved.add(plain)
    return Answer(frozenset(modules), frozenset(saved), frozenset(parameters))
