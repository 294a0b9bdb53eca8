"""Adapters of nothing but trained tokens on a model, and which tables are saved whole beside an adapter, beside live PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the extra `hf` is not installed")

from peft_ref.errors import ConfigError, KeyMismatchError
from peft_ref.files.adapter import all_tensors, from_state_dict, load_adapter, open_adapter
from peft_ref.files.config import from_dict
from peft_ref.model.adapted import adapt
from peft_ref.model.attaching import add
from peft_ref.model.merging import merge, merge_and_unload
from peft_ref.model.running import forward
from peft_ref.model.status import count
from peft_ref.model.storing import load, save
from peft_ref.model.switching import activate
from tests.model.live import frozen_graph, layer_output, mirrored, peft, randomise, torch
from tests.model.test_tokens import HEAD, TABLE, X, lora, net

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
FILES = ("adapter_config.json", "adapter_model.safetensors")


def tokens(*indices: int, of: Any = None) -> Any:
    return peft.TrainableTokensConfig(token_indices=list(indices), target_modules=of)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_tied_follows_an_adapter_of_nothing_but_tokens_too(tied: bool, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(tied), tokens(7, 2))
    randomise(theirs, "default", 3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(adapt(frozen_graph(net(tied))), tmp_path / "theirs", trainable=True)
    for module in (TABLE, HEAD):
        np.testing.assert_allclose(forward(ours, module, X[module]), layer_output(theirs, module, X[module]), rtol=1e-12, atol=1e-12)
    assert count(ours)[:2] == theirs.get_nb_trainable_parameters()
    save(ours, tmp_path / "ours")
    assert (tmp_path / "ours/adapter_model.safetensors").read_bytes() == (tmp_path / "theirs/adapter_model.safetensors").read_bytes()
    merged = merge_and_unload(ours)
    np.testing.assert_array_equal(merged.weight(f"{HEAD}.weight"), theirs.merge_and_unload().lm_head.weight.detach().numpy())


def test_adapters_of_nothing_but_tokens_are_together_where_no_token_is_in_both() -> None:
    lists = {"a": [7, 2], "b": [3], "c": [2, 1]}
    theirs = peft.get_peft_model(net(False), tokens(*lists["a"]), adapter_name="a")
    for name in "bc":
        theirs.add_adapter(name, tokens(*lists[name]))
    for seed, name in enumerate(lists):
        randomise(theirs, name, seed)
    ours = mirrored(frozen_graph(net(False)), theirs, tuple(lists))
    theirs.base_model.set_adapter(["b", "a"])
    both = activate(ours, ["b", "a"])
    np.testing.assert_array_equal(forward(both, TABLE, X[TABLE]), layer_output(theirs, TABLE, X[TABLE]))
    with pytest.raises(ConfigError, match=r"'a' and 'c' both train token 2 of 'model.embed_tokens' and are active together"):
        activate(ours, ["a", "c"])
    theirs.base_model.set_adapter(["a", "c"])
    with pytest.raises(ValueError, match="disjunct"):
        layer_output(theirs, TABLE, X[TABLE])
    for before, names in (([], ["a", "c"]), (["a"], ["c"])):  # at once, or one after the other
        theirs.merge_adapter(before)
        with pytest.raises(ValueError, match="disjunct"):
            theirs.merge_adapter(names)
        with pytest.raises(ConfigError, match=r"both train token 2 of 'model.embed_tokens' and are merged together"):
            merge(merge(ours, before), names)
    theirs.unmerge_adapter()
    theirs.merge_adapter(["b", "c"])
    merged = merge(activate(ours, "b"), ["b", "c"])
    np.testing.assert_array_equal(forward(merged, TABLE, X[TABLE]), layer_output(theirs, TABLE, X[TABLE]))


NAMED = [["embed_tokens", "lm_head"], ["lm_head", "model.embed_tokens"], r".*(embed_tokens|lm_head)"]


def both_named(tied: bool, targets: Any, folder: Path) -> Any:
    theirs = peft.get_peft_model(net(tied), tokens(7, 2, of=targets))
    randomise(theirs, "default", 3)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("targets", NAMED, ids=str)
def test_a_table_and_what_is_tied_to_it_are_not_both_named_since_peft_cannot_run_that(targets: Any, tmp_path: Path) -> None:
    theirs = both_named(True, targets, tmp_path)
    ids = torch.arange(4)[None]
    for live_model in (theirs, peft.PeftModel.from_pretrained(net(True), tmp_path)):
        with pytest.raises(ValueError, match="wraps an unknown layer"):
            live_model(ids)
    said = "names 'model.embed_tokens', and 'lm_head' too, which is tied to it"
    for lazy in (False, True):
        with pytest.raises(ConfigError, match=said):
            load(adapt(frozen_graph(net(True))), tmp_path, lazy=lazy)
    config = from_dict({"peft_type": "TRAINABLE_TOKENS", "token_indices": [7, 2], "target_modules": targets})
    with pytest.raises(ConfigError, match=said):
        add(adapt(frozen_graph(net(True))), "default", config, np.random.default_rng(0))


@pytest.mark.parametrize("targets", NAMED, ids=str)
def test_a_table_and_a_head_of_its_own_are_both_named_as_in_peft(targets: Any, tmp_path: Path) -> None:
    theirs = both_named(False, targets, tmp_path / "theirs")
    ours = load(adapt(frozen_graph(net(False))), tmp_path / "theirs")
    for module in (TABLE, HEAD):
        np.testing.assert_allclose(forward(ours, module, X[module]), layer_output(theirs, module, X[module]), rtol=1e-12, atol=1e-12)
    save(ours, tmp_path / "ours")
    for file in FILES:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


TARGETS = (None, ["q_proj"], ["embed_tokens"], ["model.embed_tokens"], ["lm_head"], r".*\.embed_tokens", r".*(q_proj|lm_head)")
ASKED: dict[str, Any] = {
    "lora": lambda of: lora(target_modules=of or ["k_proj"]),
    "lora and rows of another layer": lambda of: lora(target_modules=of or ["v_proj"], trainable_token_indices={"k_proj": [3]}),
    "tokens": lambda of: tokens(7, 2, of=of),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("case", ASKED)
def test_the_tables_that_are_saved_whole_are_pefts_to_the_byte(case: str, targets: Any, tied: bool, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(tied), ASKED[case](targets))
    for n, wanted in enumerate(("auto", True, False)):
        theirs.save_pretrained(tmp_path / f"theirs{n}", save_embedding_layers=wanted)
        ours = load(adapt(frozen_graph(net(tied))), tmp_path / f"theirs{n}", ties="share")
        save(ours, tmp_path / f"ours{n}", embeddings=wanted)
        for file in FILES:
            assert (tmp_path / f"ours{n}" / file).read_bytes() == (tmp_path / f"theirs{n}" / file).read_bytes(), (wanted, file)


@pytest.mark.parametrize("tied", [False, True])
def test_beside_a_table_that_is_adapted_one_with_trained_tokens_is_not_saved_whole(tied: bool, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(tied), lora(target_modules=["embed_tokens"], trainable_token_indices={"lm_head": [3]}))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    save(load(adapt(frozen_graph(net(tied))), tmp_path / "theirs", ties="share"), tmp_path / "ours", embeddings=True)
    for file in FILES:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_rows_that_peft_saves_once_more_for_every_further_adapter_are_read_once(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(net(True), tokens(7, 2))
    for n, name in enumerate(("default", "b", "c")):
        if n:
            theirs.add_adapter(name, tokens(3 + n))
        randomise(theirs, name, n)
    theirs.save_pretrained(tmp_path)
    ids, file = torch.arange(9)[None], load_adapter(tmp_path)
    assert sorted(file.modules) == [HEAD, TABLE]
    assert len(open_adapter(tmp_path).entries) == 4
    ours = load(adapt(frozen_graph(net(True))), tmp_path)
    alone = peft.PeftModel.from_pretrained(net(True), tmp_path)
    alone(ids)
    for module in (TABLE, HEAD):
        np.testing.assert_allclose(forward(ours, module, X[module]), layer_output(alone, module, X[module]), rtol=1e-12, atol=1e-12)
    save(ours, tmp_path / "ours")
    alone.save_pretrained(tmp_path / "alone")
    assert (tmp_path / "ours" / FILES[1]).read_bytes() == (tmp_path / "alone" / FILES[1]).read_bytes()


@pytest.mark.parametrize("change", [lambda rows: rows + 1, lambda rows: rows[:1]], ids=["other", "fewer"])
def test_rows_that_are_there_once_more_and_differ_are_refused(change: Any, tmp_path: Path) -> None:
    both_named(True, None, tmp_path)
    file = load_adapter(tmp_path)
    tensors = {key: np.ones_like(tensor) for key, tensor in all_tensors(file).items()}  # so that fewer rows are the same by broadcasting
    rows = tensors[f"base_model.model.{HEAD}.trainable_tokens_delta"]
    again = f"base_model.model.{HEAD}.base_layer.trainable_tokens_delta"
    assert from_state_dict(file.config, {**tensors, again: rows}).modules.keys() == file.modules.keys()
    with pytest.raises(
        KeyMismatchError, match=r"lm_head.base_layer.trainable_tokens_delta is not base_model.model.lm_head.trainable_tokens"
    ):
        from_state_dict(file.config, {**tensors, again: change(rows)})
