"""trainable_token_indices of a LoRA on a model, beside live PEFT: every operation, files both ways, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

import transformers

from peft_ref.errors import ConfigError, KeyMismatchError, NotMergeableError, PeftRefError, TargetError
from peft_ref.files.adapter import all_tensors, load_adapter, open_adapter, save_adapter, save_tensors
from peft_ref.files.config import from_dict
from peft_ref.graph import MappingGraph
from peft_ref.layers import Embedding, Linear
from peft_ref.model.adapted import Adapted, adapt
from peft_ref.model.attaching import add, update
from peft_ref.model.combine import add_weighted
from peft_ref.model.converting import converted
from peft_ref.model.exact import add_exact
from peft_ref.model.lazy import LazyModules
from peft_ref.model.merging import merge, merge_and_unload
from peft_ref.model.running import forward
from peft_ref.model.status import count, layer_status, model_status
from peft_ref.model.storing import load, save, state_dict
from peft_ref.model.swapping import hotswap
from peft_ref.model.switching import activate
from tests.model.live import config_of, frozen_graph, layer_output, mirrored, peft, randomise, tensors_of, torch
from tests.model.test_against_peft import OPERATIONS

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
SIZES = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2}
TABLE, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj"
X = {
    TABLE: np.arange(12).reshape(3, 4),
    HEAD: np.random.default_rng(1).normal(size=(2, 8)),
    Q: np.random.default_rng(2).normal(size=(3, 8)),
}
# What PEFT is asked for; which modules' rows the file then has, of a model that is not tied and of one that is.
CASES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "list": ({"trainable_token_indices": [7, 2, 9]}, {TABLE}, {TABLE}),
    "table": ({"trainable_token_indices": {"embed_tokens": [7, 2]}}, {TABLE}, {TABLE}),
    "head": ({"trainable_token_indices": {"lm_head": [7, 2]}}, {HEAD}, {HEAD}),
    "both alike": ({"trainable_token_indices": {"lm_head": [7, 2], "embed_tokens": [7, 2]}}, {TABLE, HEAD}, {TABLE}),
    "both apart": ({"trainable_token_indices": {"lm_head": [5], "embed_tokens": [7, 2]}}, {TABLE, HEAD}, {TABLE, HEAD}),
    "kept tied": ({"trainable_token_indices": [7, 2], "ensure_weight_tying": True}, {TABLE}, {TABLE}),
    "dora": ({"trainable_token_indices": [7, 2], "use_dora": True}, {TABLE}, {TABLE}),
    "another layer": ({"trainable_token_indices": {"k_proj": [3]}}, {Q.replace("q_", "k_")}, {Q.replace("q_", "k_")}),
}
APART = ("head", "both apart")  # of a tied model one name of the weight gets other rows than the other


def net(tied: bool, dtype: Any = torch.float64) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})


def theirs_of(tied: bool, *options: dict[str, Any], dtype: Any = torch.float64) -> Any:
    """PEFT's model with an adapter for each of `options`, called "a", "b", and so on; of one alone "default"."""
    names = ["default"] if len(options) == 1 else ["a", "b", "c"][: len(options)]
    model = peft.get_peft_model(net(tied, dtype), lora(**options[0]), adapter_name=names[0])
    for name, more in zip(names[1:], options[1:], strict=True):
        model.add_adapter(name, lora(**more))
    for seed, name in enumerate(names):
        randomise(model, name, 3 + seed)
    return model.eval()


def compare(theirs: Any, ours: Adapted, when: str) -> None:
    for module, x in X.items():
        np.testing.assert_allclose(forward(ours, module, x), layer_output(theirs, module, x), rtol=1e-10, atol=1e-10, err_msg=when)
    assert [status._asdict() for status in layer_status(ours)] == [vars(status) for status in theirs.get_layer_status()], when
    assert model_status(ours)._asdict() | {"base_model_type": "LlamaForCausalLM"} == vars(theirs.get_model_status()), when
    assert count(ours)[:2] == theirs.get_nb_trainable_parameters(), when


SCRIPTS = (
    ("nothing", "activate b", "merge", "unmerge", "freeze a", "train b", "disable", "enable", "activate a", "delete a"),
    ("merge a", "merge b", "unmerge", "merge safely", "disable", "enable", "merge", "unmerge", "activate b for inference", "delete b"),
)


@pytest.mark.parametrize("script", SCRIPTS, ids=["switched", "merged"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_operation_does_what_it_does_in_peft(tied: bool, script: tuple[str, ...]) -> None:
    graph = frozen_graph(net(tied))
    theirs = theirs_of(tied, {"trainable_token_indices": [7, 2, 9]}, {"trainable_token_indices": [3, 11]})
    ours = mirrored(graph, theirs, ("a", "b"))
    for n, operation in enumerate(script):
        their_step, our_step = OPERATIONS[operation]
        their_step(theirs)
        ours = our_step(ours)
        compare(theirs, ours, f"after {', '.join(script[: n + 1])}")


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_pefts_computes_here_what_it_does_there_and_is_written_back_to_the_byte(
    case: str, tied: bool, lazy: bool, tmp_path: Path
) -> None:
    options, *there = CASES[case]
    theirs = theirs_of(tied, options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(adapt(frozen_graph(net(tied))), tmp_path / "theirs", lazy=lazy)
    assert isinstance(ours.adapters["default"].modules, LazyModules) == lazy
    for module, x in X.items():
        np.testing.assert_allclose(forward(ours, module, x), layer_output(theirs, module, x), rtol=1e-12, atol=1e-12)
    keys = {key.removeprefix("base_model.model.") for key in state_dict(ours, "default") if "lora_" not in key}
    assert keys == {f"{module}.token_adapter.trainable_tokens_delta" for module in there[tied]}
    save(ours, tmp_path / "ours")
    save_adapter(tmp_path / "read", load_adapter(tmp_path / "theirs"))  # without a model
    for copy in ("ours", "read"):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / copy / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), (copy, file)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if case != "dora"])
def test_what_is_merged_and_unloaded_has_pefts_rows(case: str, tied: bool, dtype: Any, safe: bool, tmp_path: Path) -> None:
    theirs_of(tied, CASES[case][0], dtype=torch.float32).save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(tied, dtype), tmp_path).merge_and_unload(safe_merge=safe)
    graph = frozen_graph(net(tied, dtype).float())
    ours = merge_and_unload(load(adapt(graph), tmp_path), safe=safe, ties="share" if case in APART else "refuse")
    assert dict(ours.tied()) == dict(graph.tied())
    for module in (TABLE, HEAD):
        got = torch.from_numpy(np.array(ours.weight(f"{module}.weight"))).to(dtype)
        assert torch.equal(got, theirs.get_submodule(module).weight), module


@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_adapter_has_pefts_rows_and_changes_nothing(tied: bool) -> None:
    options = {"trainable_token_indices": [7, 2], "init_lora_weights": True}
    theirs = peft.get_peft_model(net(tied), lora(**options))
    ours = add(adapt(frozen_graph(net(tied))), "default", config_of(lora(**options)), np.random.default_rng(0))
    rows = next(v for key, v in tensors_of(theirs, "default").items() if "tokens" in key)
    np.testing.assert_array_equal(ours.adapters["default"].modules[TABLE].params.D, rows)
    assert (HEAD in ours.adapters["default"].modules) == tied
    assert count(ours)[:2] == theirs.get_nb_trainable_parameters()
    for module, x in X.items():
        np.testing.assert_array_equal(forward(ours, module, x), forward(adapt(ours.base), module, x))


@pytest.mark.parametrize("tied", [False, True])
def test_whole_tables_are_saved_as_peft_saves_them_and_read_again(tied: bool, tmp_path: Path) -> None:
    theirs = theirs_of(tied, CASES["list"][0])
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours = load(adapt(frozen_graph(net(tied))), tmp_path / "theirs", lazy=True)
    save(ours, tmp_path / "ours", embeddings=True)
    a, b = (open_adapter(tmp_path / whose) for whose in ("theirs", "ours"))
    assert a.entries.keys() == b.entries.keys()
    assert len(a.entries) == (6 if tied else 5)
    for key in a.entries:
        np.testing.assert_array_equal(a.tensor(key), b.tensor(key), err_msg=key)


def test_a_head_that_is_a_target_is_not_saved_whole_beside_tokens(tmp_path: Path) -> None:
    theirs_of(False, {"trainable_token_indices": [3], "target_modules": ["lm_head"]}).save_pretrained(tmp_path / "theirs")
    save(load(adapt(frozen_graph(net(False))), tmp_path / "theirs"), tmp_path / "ours")
    assert open_adapter(tmp_path / "ours").entries.keys() == open_adapter(tmp_path / "theirs").entries.keys()


def test_a_head_that_follows_has_the_tables_new_rows() -> None:
    ours = add(adapt(frozen_graph(net(True))), "default", config_of(lora(trainable_token_indices=[7, 2])), np.random.default_rng(0))
    old = ours.adapters["default"].modules[TABLE].params
    new = old._replace(D=old.D + 1)
    moved = update(ours, "default", {TABLE: new})
    np.testing.assert_array_equal(forward(moved, HEAD, X[HEAD])[:, [7, 2]], X[HEAD] @ new.D.T)
    assert update(ours, "default", {TABLE: new, HEAD: new}).adapters["default"].modules[HEAD].params.D is new.D
    with pytest.raises(KeyMismatchError, match=r"'lm_head' are not those of 'model.embed_tokens'"):
        update(ours, "default", {TABLE: new, HEAD: old})


def test_a_combination_has_the_bases_rows_as_in_peft() -> None:
    theirs = theirs_of(True, {"trainable_token_indices": [7, 2]}, {"trainable_token_indices": [3]})
    ours = mirrored(frozen_graph(net(True)), theirs, ("a", "b"))
    theirs.add_weighted_adapter(["a", "b"], [1.0, 2.0], "c", combination_type="linear")
    theirs.set_adapter("c")
    ours = activate(add_weighted(ours, ["a", "b"], [1.0, 2.0], "c", "linear"), "c")
    for module, x in X.items():  # PEFT takes the factors' roots in float32
        np.testing.assert_allclose(forward(ours, module, x), layer_output(theirs, module, x), rtol=0, atol=1e-6 if module == Q else 1e-15)
    assert state_dict(ours, "c").keys() == tensors_of(theirs, "c").keys()


# ---- what is refused, and where PEFT is odd


def asked(tied: bool = False, **options: Any) -> Adapted:
    config = from_dict({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **options})
    return add(adapt(frozen_graph(net(tied))), "default", config, np.random.default_rng(0))


def live(tied: bool = False, **options: Any) -> None:
    """What a user of PEFT does: makes it, runs it, merges it."""
    model = peft.get_peft_model(net(tied), lora(**options))
    model(torch.arange(4)[None])
    merged = model.merge_and_unload()
    assert not any("token_adapter" in name for name, _ in merged.named_modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trainable_token_indices": [12]}, "no token 12 among 12 rows"),
        ({"trainable_token_indices": [-1]}, "none below 0"),
        ({"trainable_token_indices": []}, r"is \[\] .HF PEFT takes it, and cannot run"),
        ({"trainable_token_indices": {"embed_tokens": []}}, r"of 'embed_tokens' is \[\]"),
        ({"trainable_token_indices": {"nowhere": [1]}}, "names 'nowhere'"),
        ({"trainable_token_indices": [3], "target_modules": ["embed_tokens"]}, "'model.embed_tokens' has trained tokens and is a target"),
        ({"trainable_token_indices": {"q_proj": [3]}}, "has trained tokens and is a target"),
        ({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "is trained in full"),
        ({"trainable_token_indices": {"embed_tokens": [3]}, "modules_to_save": ["embed_tokens"]}, "is trained in full"),
        ({"trainable_token_indices": [3], "modules_to_save": ["lm_head"], "tied": True}, "'lm_head' is trained in full"),
        ({"trainable_token_indices": [3], "target_modules": ["lm_head"], "tied": True}, "'lm_head' has trained tokens"),
        ({"trainable_token_indices": {"embed_tokens": [3], "lm_head": [1]}, "ensure_weight_tying": True, "tied": True}, "other tokens"),
        ({"trainable_token_indices": {"input_layernorm": [3]}}, "TrainableTokens at 'model.layers.0.input_layernorm': a norm layer"),
    ],
)  # fmt: skip
def test_what_peft_refuses_or_cannot_run_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PeftRefError, match=said):
        asked(**options)
    with pytest.raises((ValueError, TypeError, IndexError, RuntimeError, AssertionError, AttributeError)):
        live(**options)


@pytest.mark.parametrize("value", ["3", 3, [True], [1.5], {"embed_tokens": "3"}, {"": [3]}, [3, 3], [[3]]])
def test_no_list_of_tokens_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        from_dict({"peft_type": "LORA", "target_modules": ["q_proj"], "trainable_token_indices": value})


def test_more_names_of_layers_than_a_model_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 10,000"):
        from_dict({"peft_type": "LORA", "target_modules": ["q"], "trainable_token_indices": {f"t{n}": [1] for n in range(10_001)}})


def test_no_tokens_are_none() -> None:
    for value in (None, {}):
        assert asked(trainable_token_indices=value).adapters["default"].modules.keys() == {Q}


def test_lora_q_a_token_that_is_there_twice_has_its_last_row_in_peft() -> None:
    model = theirs_of(False, {"trainable_token_indices": [3, 3]})
    rows = tensors_of(model, "default")[f"base_model.model.{TABLE}.token_adapter.trainable_tokens_delta"]
    np.testing.assert_array_equal(layer_output(model, TABLE, np.array([3]))[0], rows[1])


def test_of_a_table_that_nobody_calls_an_embedding_a_list_asks_for_its_name() -> None:
    layers = {"words": Embedding(num_embeddings=5, embedding_dim=3), "q": Linear(in_features=3, out_features=2)}
    graph = MappingGraph(arrays={"words.weight": np.ones((5, 3)), "q.weight": np.ones((2, 3))}, layers=layers)
    said = {"peft_type": "LORA", "r": 1, "target_modules": ["q"], "trainable_token_indices": [1]}
    with pytest.raises(TargetError, match="Name the layer"):
        add(adapt(graph), "a", from_dict(said), np.random.default_rng(0))
    named = add(adapt(graph), "a", from_dict({**said, "trainable_token_indices": {"words": [1]}}), np.random.default_rng(0))
    assert named.adapters["a"].modules.keys() == {"words", "q"}


def test_two_adapters_with_tokens_are_not_active_together_and_merge_where_the_tokens_differ() -> None:
    theirs = theirs_of(True, *({"trainable_token_indices": tokens} for tokens in ([7, 2], [3], [2, 1])))
    ours = mirrored(frozen_graph(net(True)), theirs, ("a", "b", "c"))
    with pytest.raises(ConfigError, match=r"'a' and 'b' both train tokens of 'model.embed_tokens' and are active"):
        activate(ours, ["a", "b"])
    with pytest.raises(ValueError, match="Only one adapter"):
        theirs.base_model.set_adapter(["a", "b"])
    with pytest.raises(ConfigError, match=r"'a' and 'c' both train token 2 of 'model.embed_tokens' and are merged"):
        merge(ours, ["a", "c"])
    with pytest.raises(ValueError, match="disjunct"):
        theirs.merge_adapter(["a", "c"])
    both = merge_and_unload(ours, ["b", "a"])
    fresh = theirs_of(True, *({"trainable_token_indices": tokens} for tokens in ([7, 2], [3], [2, 1])))
    np.testing.assert_array_equal(
        both.weight(f"{TABLE}.weight"), fresh.merge_and_unload(adapter_names=["b", "a"]).get_submodule(TABLE).weight.detach().numpy()
    )


def test_an_adapter_on_a_table_and_one_with_tokens_of_it_are_not_together() -> None:
    tokens, table = {"trainable_token_indices": [3]}, {"target_modules": ["embed_tokens"]}
    for first, second in ((tokens, table), (table, tokens)):
        with pytest.raises(ConfigError, match=r"trains tokens of 'model.embed_tokens', which"):
            add(asked(**first), "b", config_of(lora(**second)), np.random.default_rng(0))
        with pytest.raises((ValueError, TypeError)):
            theirs_of(False, first, second)


def test_lora_q_peft_loads_no_adapter_without_tokens_beside_one_with(tmp_path: Path) -> None:
    for name, options in (("a", {"trainable_token_indices": [3]}), ("b", {})):
        theirs_of(False, options).save_pretrained(tmp_path / name)
    theirs = peft.PeftModel.from_pretrained(net(False), tmp_path / "a", adapter_name="a")
    with pytest.raises(KeyError, match="trainable_tokens_delta"):
        theirs.load_adapter(tmp_path / "b", "b")
    ours = load(load(adapt(frozen_graph(net(False))), tmp_path / "a", "a"), tmp_path / "b", "b")
    assert TABLE not in ours.adapters["b"].modules
    merge_and_unload(activate(ours, ["a", "b"]))


def test_lora_q_peft_leaves_rows_merged_where_another_adapter_is_activated() -> None:
    theirs = theirs_of(False, {"trainable_token_indices": [7, 2]}, {"trainable_token_indices": [3]})
    ours = mirrored(frozen_graph(net(False)), theirs, ("a", "b"))
    theirs.merge_adapter(["a"])
    theirs.set_adapter("b")
    ours = activate(merge(ours, ["a"]), "b")
    rows = {name: ours.adapters[name].modules[TABLE].params.D for name in "ab"}
    frozen = ours.frozen(f"{TABLE}.weight")
    np.testing.assert_array_equal(layer_output(theirs, TABLE, np.array([7, 3])), [rows["a"][0], frozen[3]])
    np.testing.assert_array_equal(forward(ours, TABLE, np.array([7, 3])), [frozen[7], rows["b"][0]])
    np.testing.assert_allclose(forward(ours, Q, X[Q]), layer_output(theirs, Q, X[Q]), rtol=1e-12, atol=1e-12)


def test_a_merge_of_other_rows_for_a_table_and_what_is_tied_to_it_asks_what_to_do() -> None:
    """In PEFT the one weight gets both; `share` is that, `untie` computes what the unmerged did."""
    theirs = theirs_of(True, CASES["both apart"][0])
    ours = mirrored(frozen_graph(net(True)), theirs, ("default",))
    with pytest.raises(NotMergeableError, match=r"lm_head.weight"):
        merge(ours)
    apart = merge(ours, ties="untie")
    for module, x in X.items():
        np.testing.assert_allclose(forward(apart, module, x), layer_output(theirs, module, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["missing", "renamed", "torn"])
def test_rows_that_do_not_fit_the_configuration_are_one_error(how: str, tmp_path: Path) -> None:
    theirs_of(False, {"trainable_token_indices": {"embed_tokens": [3, 1]}}).save_pretrained(tmp_path)
    file = load_adapter(tmp_path)
    key = f"base_model.model.{TABLE}.token_adapter.trainable_tokens_delta"
    tensors = all_tensors(file)
    rows = tensors.pop(key)
    if how != "missing":
        tensors[key.replace("embed", "other") if how == "renamed" else key] = rows[:, :5] if how == "torn" else rows
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    save_tensors(tmp_path, from_dict(data), tensors, {})
    with pytest.raises(PeftRefError, match="trainable_tokens_delta"):
        load(adapt(frozen_graph(net(False))), tmp_path)
    if how == "renamed":
        with pytest.raises(KeyMismatchError, match=r"names embed_tokens, and no 'model\.other_tokens'"):
            load_adapter(tmp_path)


def test_what_is_not_built_for_trained_tokens_says_so(tmp_path: Path) -> None:
    theirs_of(False, CASES["list"][0]).save_pretrained(tmp_path)
    ours, file = load(adapt(frozen_graph(net(False))), tmp_path), load_adapter(tmp_path)
    with pytest.raises(ConfigError, match="is not swapped"):
        hotswap(ours, "default", file)
    with pytest.raises(ConfigError, match="are no LoRA"):
        converted(file)
    with pytest.raises(NotMergeableError, match=r"^trainable_token_indices at 'model.embed_tokens': its effect is no delta"):
        add_exact(ours, ["default"], [1.0], "c")
