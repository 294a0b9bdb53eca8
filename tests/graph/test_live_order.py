"""The order of a checkpoint's modules is that of transformers' live model, or is said not to be known; who needs it says so."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.contracts import WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.files.config import AdapterConfig
from peft_ref.graph import CheckpointGraph
from peft_ref.graph.order import ORDERS
from peft_ref.graph.targets import Targets
from peft_ref.layers import Linear
from peft_ref.methods import METHODS
from peft_ref.methods.tinylora import TinyLoRA
from peft_ref.model import adapt
from peft_ref.model.placing import place
from tests.methods import facts

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 11,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
GPT2 = {"n_embd": 16, "n_layer": 11, "n_head": 2, "n_positions": 8}
HEADS = {
    "bert": ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"),
    "gpt2": ("CausalLM", "SequenceClassification"),
}


def saved(model_type: str, task: str, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    sizes = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **(GPT2 if model_type == "gpt2" else SMALL)}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    with contextlib.redirect_stderr(io.StringIO()):
        model = getattr(transformers, f"AutoModelFor{task}").from_config(config)
        model.save_pretrained(folder)
    return model


@pytest.mark.hf
@pytest.mark.parametrize(
    ("model_type", "task"), [(t, task) for t in ORDERS for task in HEADS.get(t, ("CausalLM", "SequenceClassification"))]
)
def test_modules_come_in_the_order_of_the_live_model(model_type: str, task: str, tmp_path: Path) -> None:
    model = saved(model_type, task, tmp_path)
    graph = CheckpointGraph(tmp_path)
    assert graph.in_order
    live = [name for name, _ in model.named_modules(remove_duplicate=False)]
    prefix = "" if any(name in live for name in graph.modules() if name) else f"{model.base_model_prefix}."
    found = [f"{prefix}{name}" if f"{prefix}{name}" in live else name for name in graph.modules() if name]
    assert found == [name for name in live if name in found]


def test_of_another_architecture_the_order_is_not_known_and_who_needs_it_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "config.json").write_text('{"model_type": "never_heard_of"}')
    save_file({f"block.{n}.{part}.weight": np.zeros((4, 4), "f4") for n in range(2) for part in ("b", "a")}, tmp_path / "model.safetensors")
    graph = CheckpointGraph(tmp_path)
    assert not graph.in_order
    config = AdapterConfig(method=TinyLoRA(r=1, u=2), targets=Targets(target_modules=["a", "b"]))
    with pytest.raises(ConfigError, match="place in the live model"):
        place(adapt(graph), config)


@pytest.mark.parametrize("name", [n for n, cls in METHODS.weights.items() if cls.common is not WeightMethod.common])
def test_who_gives_layers_their_part_by_their_place_says_so(name: str) -> None:
    fact = facts(name)
    method = METHODS.weights[name](**{**fact.required, **fact.small})
    layers = {f"layers.{n}.q": Linear(in_features=16, out_features=16) for n in range(3)}
    rng = np.random.default_rng(0)
    weights = {module: rng.normal(size=(16, 16)) for module in layers}
    turned = dict(reversed(layers.items()))
    spanned = method.spanning(layers)
    there, back = (spanned.common(given, weights, np.random.default_rng(1)) for given in (layers, turned))
    keys = spanned.shared_keys(tuple(layers)), spanned.shared_keys(tuple(turned))
    alike = keys[0] == keys[1] and all(
        np.array_equal(getattr(there[m], f), getattr(back[m], f))
        for m in layers
        for f in there[m]._fields
        if getattr(there[m], f) is not None
    )
    assert alike is not method.counts_layers
