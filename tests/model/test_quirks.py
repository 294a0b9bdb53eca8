"""What HF PEFT does and is not followed here, or is and might surprise: each claim of the docstrings seen live."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, PeftRefError
from peft_ref.files.adapter import load_config
from peft_ref.graph import CheckpointGraph
from peft_ref.model.adapted import adapt
from peft_ref.model.attaching import add, delete, update
from peft_ref.model.combine import add_weighted
from peft_ref.model.exact import add_exact
from peft_ref.model.merging import merge, merge_and_unload
from peft_ref.model.running import forward
from peft_ref.model.status import count
from peft_ref.model.storing import load, save, state_dict
from peft_ref.model.switching import activate, disable, enable
from tests.model.live import config_of, frozen_graph, inputs, layer_output, mirrored, net, peft, randomise, torch

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")
X = inputs()
RNG = np.random.default_rng(0)
Q = "layers.0.q"


def pair(first: Any, second: Any, base: Any = None) -> tuple[Any, Any]:
    model = base or net()
    graph = frozen_graph(model)
    theirs = peft.get_peft_model(model, first, adapter_name="a")
    theirs.add_adapter("b", second)
    for seed, name in enumerate("ab"):
        randomise(theirs, name, seed)
    return theirs.eval(), mirrored(graph, theirs, ("a", "b"))


def test_beside_an_adapter_called_zero_peft_loses_layer_zero_and_we_do_not() -> None:
    model = net()
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q"]), adapter_name="a")
    theirs.add_adapter("0", peft.LoraConfig(r=2, target_modules=["q"]))
    ours = adapt(frozen_graph(net()))
    for name in ("a", "0"):
        ours = add(ours, name, config_of(theirs.peft_config[name]), RNG)
    kept = set(peft.get_peft_model_state_dict(theirs, adapter_name="a"))
    assert not any("layers.0" in key for key in kept)
    whole = {f"base_model.model.layers.{i}.q.lora_{key}.weight" for i in range(2) for key in "AB"}
    assert state_dict(ours, "a").keys() == state_dict(ours, "0").keys() == whole


def test_a_dora_that_is_added_while_another_is_merged_measures_the_frozen_weight() -> None:
    """PEFT measures the merged weight, and unmerges it afterwards: its fresh DoRA is not the identity."""
    dora = peft.LoraConfig(r=2, target_modules=["q"], use_dora=True)
    model = net()
    graph = frozen_graph(model)
    base = layer_output_of(model, Q)
    theirs = peft.get_peft_model(model, dora, adapter_name="a")
    randomise(theirs, "a", 0)
    ours = mirrored(graph, theirs, ("a",))
    theirs.merge_adapter()
    theirs.add_adapter("b", dora)
    assert theirs.base_model.model.layers[0]["q"].merged_adapters == []
    ours = add(merge(ours), "b", config_of(dora), RNG)
    assert ours.merged.names == ()
    theirs.set_adapter("b")
    ours = activate(ours, "b")
    np.testing.assert_allclose(forward(ours, Q, X[Q]), base, rtol=1e-12)
    assert not np.allclose(layer_output(theirs, Q, X[Q]), base)


def layer_output_of(model: Any, module: str) -> Any:
    with torch.no_grad():
        return model.get_submodule(module)(torch.from_numpy(X[module])).numpy()


def test_with_one_of_two_active_adapters_merged_the_other_no_longer_acts() -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q"])
    theirs, ours = pair(lora, lora)
    theirs.base_model.set_adapter(["a", "b"])
    theirs.merge_adapter(["b"])
    ours = merge(activate(ours, ["a", "b"]), ["b"])
    np.testing.assert_allclose(forward(ours, Q, X[Q]), layer_output(theirs, Q, X[Q]), rtol=1e-10)
    np.testing.assert_allclose(forward(ours, Q, X[Q]), forward(activate(ours, "b"), Q, X[Q]), rtol=1e-10)


def test_what_is_merged_while_switched_off_is_unmerged_by_pefts_next_forward_and_refused_here() -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q"])
    theirs, ours = pair(lora, lora)
    theirs.base_model.disable_adapter_layers()
    theirs.merge_adapter()
    layer_output(theirs, Q, X[Q])
    assert theirs.base_model.model.layers[0]["q"].merged_adapters == []
    with pytest.raises(ConfigError):
        merge(disable(ours))
    assert merge(enable(disable(ours))).merged.names == ("a",)


def test_after_a_deletion_one_adapter_is_active_with_its_copy_and_on_every_module() -> None:
    """PEFT forgets the heir's copy, and lets every module choose an heir of its own."""
    theirs, ours = pair(
        peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]), peft.LoraConfig(r=2, target_modules=["q", "up"])
    )
    theirs.set_adapter("b")
    theirs.delete_adapter("b")
    ours = delete(activate(ours, "b"), "b")
    assert ours.active_names == ("a",)
    assert theirs.base_model.model.head.active_adapters == []
    assert theirs.active_adapters == ["a"]
    np.testing.assert_array_equal(ours.weight("head.weight"), ours.adapters["a"].saved["head.weight"])


def test_the_heir_of_a_deleted_adapter_is_the_first_by_name_as_in_peft() -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q"])
    theirs = peft.get_peft_model(net(), lora, adapter_name="b")
    ours = add(adapt(frozen_graph(net())), "b", config_of(lora), RNG)
    for name in "dca":
        theirs.add_adapter(name, lora)
        ours = add(ours, name, config_of(lora), RNG)
        assert tuple(count(ours)) == theirs.get_nb_trainable_parameters()
    for name in ("b", "a", "c"):
        theirs.delete_adapter(name)
        ours = delete(ours, name)
        assert list(ours.active_names) == theirs.active_adapters
        assert tuple(count(ours)) == theirs.get_nb_trainable_parameters()


def test_two_names_for_one_adapter_act_twice_in_peft_and_are_refused_here() -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q"])
    theirs, ours = pair(lora, lora)
    base = forward(activate(ours, []), Q, X[Q])
    theirs.base_model.set_adapter(["a", "a"])
    np.testing.assert_allclose(layer_output(theirs, Q, X[Q]) - base, 2 * (forward(ours, Q, X[Q]) - base), rtol=1e-9)
    for refused in (lambda: activate(ours, ["a", "a"]), lambda: merge(ours, ["a", "a"]), lambda: activate(ours, "x")):
        with pytest.raises(ConfigError):
            refused()


def test_cat_mixes_the_groups_of_a_convolution_in_peft_and_is_refused_here() -> None:
    def grouped() -> Any:
        return net(cls=lambda: torch.nn.ModuleDict({"c": torch.nn.Conv2d(4, 6, 2, groups=2)}))

    lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["c"])
    theirs, ours = pair(lora, lora, grouped())
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 5))
    base, a, b = (forward(activate(ours, names), "c", x) for names in ([], ["a"], ["b"]))
    theirs.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "cat")
    theirs.set_adapter("c")
    assert not np.allclose(layer_output(theirs, "c", x), a + b - base)
    with pytest.raises(PeftRefError):
        add_weighted(ours, ["a", "b"], [1.0, 1.0], "c", "cat")
    exact = activate(add_exact(ours, ["a", "b"], [1.0, 1.0], "c"), "c")
    np.testing.assert_allclose(forward(exact, "c", x), a + b - base, rtol=1e-9, atol=1e-12)


def test_a_combination_that_begins_with_a_pissa_changes_the_base_once_more_in_peft_and_is_refused_here() -> None:
    model = net().float()
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q"]), adapter_name="a")
    theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["q"]))
    layer = theirs.base_model.model.layers[0]["q"].base_layer
    before = layer.weight.detach().clone()
    theirs.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "linear")
    assert not torch.allclose(layer.weight, before)
    ours = adapt(frozen_graph(net()))
    for name in "ab":
        ours = add(ours, name, config_of(theirs.peft_config[name]), RNG)
    with pytest.raises(ConfigError):
        add_weighted(ours, ["a", "b"], [1.0, 1.0], "c", "linear")


def test_an_rslora_combination_is_too_large_in_peft_and_so_here() -> None:
    lora = peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=["q"])
    theirs, ours = pair(lora, lora)
    base = forward(activate(ours, []), Q, X[Q])
    wanted = forward(activate(ours, ["a", "b"]), Q, X[Q]) - base
    theirs.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "cat")
    theirs.set_adapter("c")
    np.testing.assert_allclose(layer_output(theirs, Q, X[Q]) - base, math.sqrt(8) * wanted, rtol=1e-9)
    exact = activate(add_exact(ours, ["a", "b"], [1.0, 1.0], "c"), "c")
    np.testing.assert_allclose(forward(exact, Q, X[Q]) - base, wanted, rtol=1e-9, atol=1e-12)


# Whole models: a task's head, defaults, and a checkpoint that is never read as a whole.

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 13}


def classifier() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, pad_token_id=0, num_labels=3)).eval()


def test_what_the_model_decides_is_written_into_the_configuration_as_peft_does(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS")
    graph = frozen_graph(classifier())
    ours = add(adapt(graph), "default", config_of(config), RNG)
    save(ours, tmp_path / "ours")
    theirs = peft.get_peft_model(classifier(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    saved, expected = load_config(tmp_path / "ours"), load_config(tmp_path / "theirs")
    assert set(saved.targets.target_modules or ()) == set(expected.targets.target_modules or ()) == {"q_proj", "v_proj"}
    assert set(saved.targets.modules_to_save or ()) == set(expected.targets.modules_to_save or ()) == {"classifier", "score"}
    assert state_dict(ours, "default").keys() == peft.get_peft_model_state_dict(theirs).keys()
    peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours")
    again = load(adapt(graph), tmp_path / "theirs")
    name = "model.layers.1.self_attn.q_proj"
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    np.testing.assert_allclose(forward(again, name, x), layer_output(theirs.eval(), name, x), rtol=1e-5, atol=1e-6)


def test_an_adapter_is_merged_into_a_checkpoint_as_into_the_live_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "model")
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    randomise(theirs, "default", 0)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.float()
    theirs.save_pretrained(tmp_path / "adapter")
    base = adapt(CheckpointGraph(tmp_path / "model"))
    ours = merge_and_unload(load(base, tmp_path / "adapter", lazy=True))
    bare = theirs.merge_and_unload()
    for name, parameter in bare.named_parameters():
        np.testing.assert_allclose(ours.weight(name), parameter.detach().numpy(), rtol=1e-6, atol=1e-7, err_msg=name)


def test_other_numbers_are_taken_in_their_shapes_and_for_what_is_there_only() -> None:
    ours = add(
        adapt(frozen_graph(net())), "a", config_of(peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"], bias="all")), RNG
    )
    p = ours.adapters["a"].modules[Q].params
    new = update(ours, "a", {Q: p._replace(B=p.B + 1)}, saved={"head.bias": np.zeros(3)}, biases={f"{Q}.bias": np.ones(5)})
    assert not np.any(new.weight("head.bias"))
    np.testing.assert_array_equal(disable(new).weight(f"{Q}.bias"), np.ones(5))  # a trained bias stays when adapters are off, as in PEFT
    np.testing.assert_array_equal(ours.adapters["a"].modules[Q].params.B, 0)
    for params, others in (
        ({Q: p._replace(B=p.A)}, {}),
        ({Q: tuple(p)}, {}),
        ({"conv": p}, {}),
        ({}, {"saved": {"conv.weight": 0}}),
        ({}, {"biases": {"nowhere.bias": 0}}),
    ):
        with pytest.raises(PeftRefError):
            update(ours, "a", params, **others)  # type: ignore[arg-type]
    with pytest.raises(PeftRefError):
        update(merge(ours), "a", {})
