"""Adapters on attention blocks in an `Adapted`: the net is the one that `Net.attention` makes, and every operation leaves the old value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.attending import AttentionAdapter
from peft_ref.errors import ConfigError, KeyMismatchError, NotMergeableError, ShapeError, TargetError
from peft_ref.files.config import AdapterConfig, from_dict
from peft_ref.graph import MappingGraph
from peft_ref.methods.adaption_prompt import AdaptionPrompt, Params
from peft_ref.model import Adapted, activate, adapt, add, count, delete, disable, enable, load, merge, save, state_dict, unload, update
from peft_ref.nn import Inputs, ModelGraph
from peft_ref.train import learner_of, net_of
from tests.nn.tiny import LLAMA

TOP, BOTH = "model.layers.1.self_attn", ("model.layers.0.self_attn", "model.layers.1.self_attn")
RNG = np.random.default_rng(1)
WEIGHTS = {name: RNG.normal(size=shape) for name, shape in LLAMA.shapes().items()}
GRAPH = ModelGraph(model=LLAMA, weights=WEIGHTS, model_config={"model_type": "llama"})
INPUTS = Inputs(input_ids=np.asarray([[1, 2, 3, 4], [5, 6, 7, 8]]))


def config(layers: int = 1, **more: Any) -> AdapterConfig:
    return from_dict({"peft_type": "ADAPTION_PROMPT", "adapter_len": 3, "adapter_layers": layers, **more})


def two() -> Adapted:
    """An adapter "a" on the top block, which acts, and "b" on both, with open gates."""
    made = add(add(adapt(GRAPH), "a", config(), np.random.default_rng(2)), "b", config(2), np.random.default_rng(3))
    for name in ("a", "b"):
        blocks = made.attached(name).blocks
        made = update(made, name, {block: found.params._replace(g=np.asarray([0.7])) for block, found in blocks.items()})
    return made


def logits(model: Adapted) -> Any:
    return LLAMA.forward(net_of(LLAMA, model), INPUTS).logits


def test_what_acts_is_what_the_net_is_given_by_hand() -> None:
    model = two()
    blocks = model.attached("b").blocks
    assert tuple(model.attached("a").blocks) == (TOP,)
    assert tuple(blocks) == BOTH
    plain = LLAMA.net(WEIGHTS)
    np.testing.assert_array_equal(logits(activate(model, "b")), LLAMA.forward(replace(plain, attention=blocks), INPUTS).logits)
    np.testing.assert_array_equal(logits(disable(model)), LLAMA.forward(plain, INPUTS).logits)
    np.testing.assert_array_equal(logits(enable(disable(model))), logits(model))
    assert len({float(np.sum(logits(m))) for m in (model, activate(model, "b"), disable(model))}) == 3
    assert model.attached("a").config.targets.target_modules == "self_attn"
    method = AdaptionPrompt(adapter_len=3, adapter_layers=1)
    assert model.attention() == {TOP: AttentionAdapter(method, model.attached("a").blocks[TOP].params)}


def test_counts_and_what_is_left_after_a_deletion() -> None:
    model, base = two(), sum(w.size for w in WEIGHTS.values())
    assert count(model) == (3 * 8 + 1, base + 3 * 8 + 1)
    assert count(activate(model, "b")) == (2 * 25, base + 2 * 25)
    assert count(disable(model)) == (0, base)
    assert delete(model, "b").active_names == ("a",)
    assert delete(model, "a").active_names == ("b",)
    assert count(delete(delete(model, "a"), "b")) == (0, base)
    three = add(model, "0", config(), np.random.default_rng(4))
    assert delete(three, "a").active_names == ("b",), "the one that came first, and not the first by name"


def test_a_file_comes_back(tmp_path: Path) -> None:
    model = two()
    save(model, tmp_path, "b")
    again = load(adapt(GRAPH), tmp_path, "c", subfolder="b")
    np.testing.assert_array_equal(logits(again), logits(activate(model, "b")))
    assert state_dict(again, "c").keys() == state_dict(model, "b").keys()
    np.testing.assert_array_equal(state_dict(again, "c")[f"base_model.model.{TOP}.adaption_gate"], [0.7])


def test_it_is_trained_alone() -> None:
    training = learner_of(LLAMA, two(), "a")
    assert training.params.adapters.keys() == {TOP}
    assert not training.params.weights
    with pytest.raises(ConfigError, match="active alone"):
        learner_of(LLAMA, two(), "b")


def test_what_is_refused() -> None:
    model, rng = two(), np.random.default_rng(0)
    for act in (merge, unload):
        with pytest.raises(NotMergeableError, match="adds to attention blocks and changes no layer"):
            act(model)
    with pytest.raises(ConfigError, match="2 adapters at once"):
        activate(model, ["a", "b"])
    with pytest.raises(ConfigError, match="trains nothing beside it"):
        add(adapt(GRAPH), "a", config(modules_to_save=["lm_head"]), rng)
    with pytest.raises(ConfigError, match="trains nothing beside it"):
        add(adapt(GRAPH), "a", config(bias="all"), rng)
    with pytest.raises(TargetError, match=r"'model\.layers\.1\.mlp' is not known as an attention block"):
        add(adapt(GRAPH), "a", config(target_modules="mlp"), rng)
    with pytest.raises(KeyMismatchError, match=r"'a' is not on 'model\.layers\.0\.self_attn'"):
        update(model, "a", {BOTH[0]: model.attached("b").blocks[BOTH[0]].params})
    with pytest.raises(ConfigError, match="are a tuple, expected those of AdaptionPrompt"):
        update(model, "a", {TOP: (1, 2)})
    with pytest.raises(ShapeError, match=r"adaption_prompt is \(1, 2, 8\), expected \(1, 3, 8\)"):
        update(model, "a", {TOP: Params(E=np.zeros((1, 2, 8)), g=np.zeros(1))})
    with pytest.raises(TargetError, match=r"load the model with peft_ref\.nn"):
        add(adapt(MappingGraph(arrays=WEIGHTS, model_config={"model_type": "llama"})), "a", config(), rng)
