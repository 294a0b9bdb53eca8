"""layer_replication beside PEFT's: the same modules, weights, ties and adapters as in the model that PEFT rebuilds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.tuners_utils import replicate_layers  # noqa: E402

from peft_ref.errors import ConfigError, NotMergeableError, TargetError  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.graph import MappingGraph, ReplicatedGraph, TorchGraph  # noqa: E402
from peft_ref.model import adapt, add, load, merge, merge_and_unload, state_dict  # noqa: E402
from peft_ref.model.running import forward  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
MAPS = [[[0, 3], [1, 3]], [[0, 1], [0, 1], [2, 3]], [[1, 3]], [[2, 3], [0, 2]]]
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 11}


def llama(tie: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=3, num_key_value_heads=1, intermediate_size=12, tie_word_embeddings=tie)
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, num_hidden_layers=3, intermediate_size=12))


def falcon() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=11, n_positions=16)).transformer


@pytest.mark.parametrize("layers", MAPS, ids=str)
@pytest.mark.parametrize("make", [llama, lambda: llama(True), bert, falcon], ids=["llama", "tied", "bert", "h"])
def test_the_graph_is_that_of_the_model_which_peft_rebuilds(make: Any, layers: list[list[int]]) -> None:
    base = make()
    rebuilt = copy.deepcopy(base)
    replicate_layers(rebuilt, layers)
    ours, expected = ReplicatedGraph(TorchGraph(base), layers), TorchGraph(rebuilt)
    assert list(ours.modules()) == list(expected.modules())
    for name, module in expected.modules().items():
        assert ours.modules()[name] == module
    assert ours.parameters() == expected.parameters()
    assert ours.tied() == expected.tied()
    assert ours.output_head == expected.output_head
    assert ours.pretrained == expected.pretrained
    for name in (*expected.parameters(), *expected.tied()):
        assert torch.equal(ours.weight(name), expected.weight(name)), name
    if "num_hidden_layers" in expected.config:
        assert ours.config["num_hidden_layers"] == expected.config["num_hidden_layers"]


@pytest.mark.parametrize("layers", MAPS, ids=str)
def test_an_adapter_on_replicated_layers_is_read_and_computes_as_in_peft(layers: list[list[int]], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, layer_replication=layers, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config)
    theirs.save_pretrained(tmp_path)
    assert load_adapter(tmp_path).config.housekeeping["layer_replication"] == layers
    with pytest.raises(ConfigError, match="ReplicatedGraph"):
        load(adapt(TorchGraph(llama())), tmp_path)
    ours = load(adapt(ReplicatedGraph(TorchGraph(llama()), layers)), tmp_path)
    expected = peft.get_peft_model_state_dict(theirs)
    found = state_dict(ours, "default")
    assert found.keys() == expected.keys()
    x = torch.randn(3, 8)
    for name in ours.adapters["default"].modules:
        y = x if name.endswith("q_proj") else torch.randn(3, 12)
        np.testing.assert_allclose(
            forward(ours, name, y), theirs.base_model.model.get_submodule(name)(y).detach(), rtol=1e-5, atol=1e-6, err_msg=name
        )


def test_a_merge_of_shared_layers_changes_what_peft_lets_it_change_and_is_refused_here() -> None:
    layers = [[0, 2], [0, 2]]
    config = peft.LoraConfig(r=2, layer_replication=layers, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before, after = theirs(input_ids=ids).logits, theirs.merge_and_unload()(input_ids=ids).logits
    assert float((before - after).abs().max()) > 1e-3  # PEFT asks its dictionary of adapters for layer_replication, and so never refuses
    from tests.model.live import config_of

    graph = ReplicatedGraph(TorchGraph(llama()), layers)
    ours = add(adapt(graph), "a", config_of(config), np.random.default_rng(0))
    with pytest.raises(NotMergeableError, match="untie"):
        merge(ours)
    apart = merge_and_unload(ours, ties="untie")
    name = "model.layers.2.self_attn.q_proj"
    x = torch.randn(3, 8)
    np.testing.assert_allclose(forward(apart, name, x), forward(ours, name, x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(apart.weight(f"{name}.weight"), apart.weight("model.layers.0.self_attn.q_proj.weight"))


def test_a_map_that_no_model_has_is_refused() -> None:
    for layers, message in (([[0, 4]], "0 to 2"), ([[-1, 2]], "0 to 2"), ([], "0 to 2"), ([[0]], "pairs"), ([[0, "1"]], "pairs")):
        with pytest.raises(ConfigError, match=message):
            ReplicatedGraph(TorchGraph(llama()), layers)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=r"no list of layers"):
        ReplicatedGraph(MappingGraph(arrays={"q.weight": np.ones((2, 3))}), [[0, 1]])
