"""Small random networks of ours, without torch, and what to call them with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.methods import METHODS
from peft_ref.nn import (
    GPT2,
    T5,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Blocks,
    KeyValue,
    Llama,
    Model,
    Net,
)
from peft_ref.norms import NORM
from peft_ref.stack import Adapter
from tests.methods import free, small, takes

Host = np.ndarray[Any, Any]
LLAMA = Llama(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    attention_bias=True,
    tie_word_embeddings=True,
)
_BERT: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 9,
}
MODELS: Mapping[str, Blocks] = {
    "llama": LLAMA,
    "gpt2": GPT2(vocab_size=11, n_positions=9, n_embd=8, n_layer=2, n_head=4, n_inner=6),
    "bert": BertModel(**_BERT),
    "bert classifier": BertForSequenceClassification(**_BERT, num_labels=3),
    "bert regression": BertForSequenceClassification(**_BERT, num_labels=1),
    "bert several labels": BertForSequenceClassification(**_BERT, num_labels=3),
    "bert tokens": BertForTokenClassification(**_BERT, num_labels=3),
    "bert questions": BertForQuestionAnswering(**_BERT),
    "bert masked": BertForMaskedLM(**_BERT),
}
DECODERS = tuple(name for name, model in MODELS.items() if model.causal)
ENCODERS = tuple(name for name, model in MODELS.items() if not model.causal)

_RNG = np.random.default_rng(4)
IDS = _RNG.integers(0, 11, (2, 5))
MASK = np.asarray([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
_EACH = np.where(MASK == 0, -100, _RNG.integers(0, 11, (2, 5)))
LABELS: Mapping[str, dict[str, Host]] = {
    "llama": {"labels": _EACH},
    "gpt2": {"labels": _EACH},
    "bert masked": {"labels": _EACH},
    "bert": {},
    "bert classifier": {"labels": np.asarray([2, 0])},
    "bert regression": {"labels": np.asarray([0.5, -1.0])},
    "bert several labels": {"labels": np.asarray([[1.0, 0.0, 1.0], [0.0, 0.5, 0.0]])},
    "bert tokens": {"labels": np.where(_EACH < 0, _EACH, _EACH % 3)},
    "bert questions": {"start_positions": np.asarray([1, 9]), "end_positions": np.asarray([3, 2])},
}


def prefix(name: str, length: int = 2) -> tuple[KeyValue, ...] | None:
    """Keys and values for both layers, where the model takes them: `length` places for two examples."""
    if not MODELS[name].takes_past:
        return None
    groups = LLAMA.num_key_value_heads if name == "llama" else 4
    rng = np.random.default_rng(6)
    return tuple(KeyValue(*rng.normal(size=(2, 2, groups, length, 2))) for _ in range(2))


T5_MODEL = T5(
    vocab_size=11,
    d_model=8,
    d_kv=3,
    d_ff=6,
    num_layers=1,
    num_decoder_layers=2,
    num_heads=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=5,
    dense_act_fn="gelu_new",
    is_gated_act=True,
    decoder_start_token_id=0,
)


NOT_THE_DERIVATIVE = ("loha_effective", "velora")  # whose gradient is not that of the loss, as in PEFT


def random_net(model: Model, seed: int = 1) -> Net:
    rng = np.random.default_rng(seed)
    return model.net({name: 0.4 * rng.normal(size=shape) + (len(shape) == 1) for name, shape in model.shapes().items()})


def with_every_method(net: Net, seed: int = 2) -> Net:
    """An adapter at every layer but the last norm, the methods in turn, its numbers random: no fresh adapter that does nothing."""
    rng = np.random.default_rng(seed)
    adapters = {}
    last_norm = [name for name, layer in net.layers.items() if layer.kind == NORM][-1]
    for n, (name, layer) in enumerate(net.layers.items()):
        if name == last_norm:
            continue
        able = [m for m in (small(m) for m in METHODS.weights if free(m) and m not in NOT_THE_DERIVATIVE) if takes(m, layer)]
        method = able[n % len(able)]
        tensors = {spec.key: 1 + 0.3 * rng.normal(size=spec.stored_shape) for spec in method.spec(layer)}
        adapters[name] = (Adapter(method, method.unpack(layer, tensors)),)
    return replace(net, adapters=adapters)


def mapped(net: Net, f: Any) -> Net:
    """Every array of `net` sent through `f`."""
    adapters = {
        name: tuple(Adapter(a.method, type(a.params)(*(None if p is None else f(p) for p in a.params))) for a in stack)
        for name, stack in net.adapters.items()
    }
    return replace(net, weights={name: f(w) for name, w in net.weights.items()}, adapters=adapters)


def arrays(gradients: Any) -> dict[str, Any]:
    """Every array of a ModelGradients by a name of its own."""
    output = gradients.output
    found = {name: getattr(output, name) for name in ("logits", "loss", "hidden", "pooled") if getattr(output, name) is not None}
    found |= {f"cache {n}.{kv}": a for n, both in enumerate(output.cache or ()) for kv, a in zip("kv", both, strict=True)}
    found["inputs_embeds"] = gradients.inputs_embeds
    found |= {f"past {n}.{kv}": a for n, both in enumerate(gradients.past or ()) for kv, a in zip("kv", both, strict=True)}
    found |= dict(gradients.net.weights)
    for name, stack in gradients.net.adapters.items():
        found |= {f"{name} {n} {f}": a for n, p in enumerate(stack) for f, a in p._asdict().items() if a is not None}
    return found
