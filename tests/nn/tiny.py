"""A small random network of ours, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from peft_ref.methods import METHODS
from peft_ref.nn import T5, Llama, Model, Net
from peft_ref.stack import Adapter
from tests.required import made

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
MODELS: Mapping[str, Model] = {"llama": LLAMA}


def random_net(model: Model, seed: int = 1) -> Net:
    rng = np.random.default_rng(seed)
    return model.net({name: 0.4 * rng.normal(size=shape) + (len(shape) == 1) for name, shape in model.shapes().items()})


def with_every_method(net: Net, seed: int = 2) -> Net:
    """An adapter at every layer, the methods in turn, its numbers random: no fresh adapter that does nothing."""
    rng = np.random.default_rng(seed)
    adapters = {}
    for n, (name, layer) in enumerate(net.layers.items()):
        able = [made(m) for m in METHODS.weights if layer.kind in METHODS.weights[m].kinds]
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
    found = {"logits": gradients.output.logits, "loss": gradients.output.loss, "inputs_embeds": gradients.inputs_embeds}
    found |= {f"cache {n}.{kv}": a for n, both in enumerate(gradients.output.cache) for kv, a in zip("kv", both, strict=True)}
    found |= {f"past {n}.{kv}": a for n, both in enumerate(gradients.past or ()) for kv, a in zip("kv", both, strict=True)}
    found |= dict(gradients.net.weights)
    for name, stack in gradients.net.adapters.items():
        found |= {f"{name} {n} {f}": a for n, p in enumerate(stack) for f, a in p._asdict().items() if a is not None}
    return found
