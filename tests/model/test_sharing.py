"""What adapters share: a batch, a layer with adapters of other types, a weight with a second name. Beside live HF PEFT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, NotMergeableError, PeftRefError
from peft_ref.model.adapted import Adapted, adapt
from peft_ref.model.attaching import add, update
from peft_ref.model.merging import merge, merge_and_unload, unload, unmerge
from peft_ref.model.running import forward, forward_rows, run_rows
from peft_ref.model.storing import state_dict
from peft_ref.model.switching import activate, disable
from tests.model.live import (
    INPUTS,
    config_of,
    frozen_graph,
    inputs,
    layer_output,
    mirrored,
    net,
    peft,
    randomise,
    tensors_of,
    torch,
)

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")
X = inputs()
EVERY = ["q", "up", "conv", "table"]


# Rows of one batch, each under the adapter it names.


class Chain(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.table, self.q, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 5), torch.nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.q(self.table(x)))


def chain(ours: Adapted, x: Any) -> Any:
    for module in ("table", "q", "head"):
        x = forward(ours, module, x)
    return x


def both_chains(**options: Any) -> tuple[Any, Adapted]:
    model = net(cls=Chain)
    graph = frozen_graph(model)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["table", "q"], modules_to_save=["head"], **options), adapter_name="a"
    )
    theirs.add_adapter("b", peft.LoraConfig(r=3, target_modules=["q"], modules_to_save=["head"]))
    for seed, name in enumerate(("a", "b")):
        randomise(theirs, name, seed)
    return theirs.eval(), mirrored(graph, theirs, ("a", "b"))


ROWS = ["b", "__base__", "a", "b", "a"]


def test_every_row_is_run_under_the_adapter_it_names_as_in_peft() -> None:
    theirs, ours = both_chains()
    x = np.random.default_rng(0).integers(0, 7, (5, 3))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x), adapter_names=ROWS).numpy()
    y = x
    for module in ("table", "q", "head"):
        y = forward_rows(ours, module, y, ROWS)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    whole = run_rows(x, ROWS, lambda name, rows: chain(activate(ours, [] if name == "__base__" else name), rows))
    np.testing.assert_array_equal(whole, y)


def test_a_row_under_a_dora_is_what_the_dora_alone_makes_of_it() -> None:
    """PEFT refuses; a row is run as if its adapter were the only one."""
    theirs, ours = both_chains(use_dora=True)
    x = np.random.default_rng(0).integers(0, 7, (5, 3))
    with pytest.raises(ValueError):
        theirs(torch.from_numpy(x), adapter_names=ROWS)
    y = forward_rows(ours, "table", x, ROWS)
    for row, name in enumerate(ROWS):
        alone = forward(activate(ours, [] if name == "__base__" else name), "table", x[row : row + 1])
        np.testing.assert_array_equal(y[row : row + 1], alone)


@pytest.mark.parametrize("case", ["too few names", "unknown name", "merged"])
def test_rows_that_peft_refuses_are_refused(case: str) -> None:
    theirs, ours = both_chains()
    x = np.random.default_rng(0).integers(0, 7, (5, 3))
    names = {"too few names": ROWS[:4], "unknown name": [*ROWS[:4], "c"], "merged": ROWS}[case]
    if case == "merged":
        theirs.merge_adapter()
        ours = merge(ours)
    with pytest.raises(ValueError):
        theirs(torch.from_numpy(x), adapter_names=names)
    with pytest.raises(PeftRefError):
        forward_rows(ours, "table", x, names)


def test_rows_of_a_disabled_model_are_the_bases() -> None:
    _, ours = both_chains()
    x = np.random.default_rng(0).integers(0, 7, (5, 3))
    np.testing.assert_array_equal(forward_rows(disable(ours), "table", x, ROWS), forward(activate(ours, []), "table", x))


# Adapters of several types on one layer.

TYPES = {
    "a": lambda: peft.LoraConfig(r=2, target_modules=EVERY, use_dora=True),
    "b": lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=["q", "up"]),  # PEFT cannot wrap a convolution twice
    "c": lambda: peft.LoraConfig(r=3, target_modules=["q"]),
    "d": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q", "up"]),
}


def both_mixed() -> tuple[Any, Adapted]:
    model = net()
    graph = frozen_graph(model)
    theirs = peft.get_peft_model(model, TYPES["a"](), adapter_name="a", mixed=True)
    for name in "bcd":
        theirs.add_adapter(name, TYPES[name]())
    for seed, name in enumerate(TYPES):
        randomise(theirs, name, seed)
    ours = adapt(graph, mixed=True)
    for name in TYPES:
        ours = add(ours, name, config_of(theirs.peft_config[name]), np.random.default_rng(0))
        values = {key: value for key, value in theirs.named_parameters() if f".{name}." in f"{key}."}
        params = {}
        for module, (method, layer, _) in ours.adapters[name].modules.items():
            own = {}
            for spec in method.spec(layer):
                start, last = f"base_model.model.{module}.", spec.key.removesuffix(".weight")
                own[spec.key] = next(v for k, v in values.items() if k.startswith(start) and last in k.split(".")).detach().numpy().copy()
            params[module] = method.unpack(layer, own)
        ours = update(ours, name, params)
    return theirs.eval(), ours


@pytest.mark.parametrize("active", [["a"], ["b", "a"], ["d", "c", "b", "a"], ["c", "b"], ["d", "a"]], ids="".join)
def test_mixed_adapters_act_as_in_peft(active: list[str]) -> None:
    theirs, ours = both_mixed()
    theirs.set_adapter(active)
    ours = activate(ours, active)
    for module in INPUTS:
        np.testing.assert_allclose(forward(ours, module, X[module]), layer_output(theirs, module, X[module]), rtol=1e-10, atol=1e-10)
    assert tuple(theirs.get_nb_trainable_parameters())[1] == sum(
        parameter.numel() for parameter in dict(theirs.named_parameters()).values()
    )
    merged = merge(ours)
    for module in INPUTS:
        np.testing.assert_allclose(forward(merged, module, X[module]), forward(ours, module, X[module]), rtol=1e-10, atol=1e-10)
    if "a" not in active:  # PEFT merges a DoRA before what lies inside or outside of it
        bare = theirs.merge_and_unload()
        for name, parameter in bare.named_parameters():
            np.testing.assert_allclose(unload(merged).weight(name), parameter.detach().numpy(), rtol=1e-10, atol=1e-12)


def test_a_type_that_does_not_mix_is_refused_as_in_peft() -> None:
    theirs, ours = both_mixed()
    ia3 = peft.IA3Config(target_modules=["q"], feedforward_modules=[])
    with pytest.raises(ValueError):
        theirs.add_adapter("e", ia3)
    with pytest.raises(ConfigError):
        add(ours, "e", config_of(ia3), np.random.default_rng(0))
    plain = peft.get_peft_model(net(), TYPES["a"]())
    with pytest.raises(ValueError):
        plain.add_adapter("b", TYPES["b"]())
    ours = add(adapt(ours.base), "a", config_of(TYPES["a"]()), np.random.default_rng(0))
    with pytest.raises(ConfigError):
        add(ours, "b", config_of(TYPES["b"]()), np.random.default_rng(0))


# A weight with two names.

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 13}
EMBED, HEAD = "model.embed_tokens", "lm_head"
TOKENS, HIDDEN = np.array([[1, 5, 12]]), np.random.default_rng(0).normal(size=(2, 8))


def tied_model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)).double().eval()


def both_tied(targets: list[str], **options: Any) -> tuple[Any, Adapted]:
    model = tied_model()
    graph = frozen_graph(model)
    assert graph.tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))
    randomise(theirs, "default", 0)
    ours = mirrored(graph, theirs, ("default",))
    return theirs.eval(), ours


def outputs(ours: Adapted) -> list[Any]:
    return [forward(ours, EMBED, TOKENS), forward(ours, HEAD, HIDDEN)]


def their_outputs(theirs: Any) -> list[Any]:
    return [layer_output(theirs, EMBED, TOKENS), layer_output(theirs, HEAD, HIDDEN)]


TARGETS = (["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"])


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_a_merge_into_a_tied_weight_parts_it_shares_it_or_is_refused(targets: list[str]) -> None:
    theirs, ours = both_tied(targets)
    before = outputs(ours)
    np.testing.assert_equal([np.allclose(a, b) for a, b in zip(before, their_outputs(theirs), strict=True)], [True, True])
    with pytest.raises(NotMergeableError, match="untie"):
        merge(ours)
    parted = merge(ours, ties="untie")
    assert parted.tied() == {}
    assert "lm_head.weight" in parted.parameters()
    for found, expected in zip(outputs(parted), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    for found, expected in zip(outputs(unmerge(parted)), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert unmerge(parted).tied() == ours.tied()
    left = merge_and_unload(ours, ties="untie")
    for found, expected in zip(outputs(left), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    shared = merge(ours, ties="share")
    theirs.merge_adapter()
    for found, expected in zip(outputs(shared), their_outputs(theirs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert not all(np.allclose(found, was) for found, was in zip(outputs(shared), before, strict=True))  # PEFT says nothing of it
    assert shared.tied() == ours.tied()


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_a_tied_models_adapter_is_saved_as_peft_saves_it(targets: list[str]) -> None:
    theirs, ours = both_tied(targets)
    expected, found = tensors_of(theirs, "default"), state_dict(ours, "default")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[key])


@pytest.mark.parametrize("saved", [EMBED, HEAD])
def test_a_copy_of_a_tied_module_is_tied_no_longer(saved: str) -> None:
    theirs, ours = both_tied(["q_proj"], modules_to_save=[saved.rpartition(".")[2]])
    assert ours.tied() == {}
    assert "lm_head.weight" in ours.parameters()
    for found, expected in zip(outputs(ours), their_outputs(theirs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    for found, expected in zip(outputs(unload(ours)), outputs(ours), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert disable(ours).tied() == ours.base.tied()
    base = adapt(ours.base)
    for found, expected in zip(outputs(disable(ours)), outputs(base), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_an_init_that_changes_a_tied_weight_is_refused_or_parts_it() -> None:
    graph = frozen_graph(tied_model())
    config = config_of(peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights="pissa"))
    with pytest.raises(NotMergeableError):
        add(adapt(graph), "a", config, np.random.default_rng(0))
    parted = add(adapt(graph), "a", config, np.random.default_rng(0), ties="untie")
    for found, expected in zip(outputs(parted), outputs(adapt(graph)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    shared = add(adapt(graph), "a", config, np.random.default_rng(0), ties="share")
    assert not np.allclose(outputs(shared)[0], outputs(adapt(graph))[0])
