"""Laws of matching that need no PEFT: what is named is found, what is not is explained."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_ref.errors import ConfigError, KeyMismatchError, TargetError, UnsupportedLayerError
from peft_ref.graph import MappingGraph, Targets, explain, match
from peft_ref.layers import Conv

NAMES = [f"model.layers.{i}.{block}.{leaf}" for i in (0, 1, 10) for block in ("attn", "mlp") for leaf in ("q_proj", "xq_proj", "up")]
GRAPH = MappingGraph(
    arrays={**{f"{name}.weight": np.zeros((3, 2)) for name in NAMES}, "model.norm.weight": np.zeros(2), "lm_head.weight": np.zeros((5, 2))},
    head="lm_head",
)
ENTRIES = st.sampled_from([*NAMES, "q_proj", "attn.up", "1.attn.q_proj", "up", "0.mlp.up"])


@given(st.lists(ENTRIES, min_size=1, max_size=3))
def test_a_list_finds_names_and_ends_of_names_from_a_dot_on(entries: list[str]) -> None:
    expected = [name for name in NAMES if any(f".{name}".endswith(f".{entry}") for entry in entries)]
    assert list(match(Targets(target_modules=tuple(entries)), GRAPH).modules) == expected


@given(st.lists(ENTRIES, min_size=1, max_size=3), st.lists(ENTRIES, min_size=1, max_size=2))
def test_what_is_excluded_is_never_found_and_nothing_else_is_lost(entries: list[str], excluded: list[str]) -> None:
    every = set(match(Targets(target_modules=tuple(entries)), GRAPH).modules)
    out = {name for name in every if any(f".{name}".endswith(f".{entry}") for entry in excluded)}
    targets = Targets(target_modules=tuple(entries), exclude_modules=tuple(excluded))
    if out == every:
        with pytest.raises(TargetError):
            match(targets, GRAPH)
    else:
        assert set(match(targets, GRAPH).modules) == every - out


@given(st.lists(ENTRIES, min_size=1, max_size=3))
def test_every_module_is_explained_and_the_chosen_ones_as_chosen(entries: list[str]) -> None:
    targets = Targets(target_modules=tuple(entries))
    reasons = explain(targets, GRAPH)
    assert list(reasons) == list(GRAPH.modules())
    chosen = set(match(targets, GRAPH).modules)
    assert chosen == {name for name, reason in reasons.items() if "no entry" not in reason}


def test_all_linear_leaves_the_head_and_the_norms_out() -> None:
    assert list(match(Targets(target_modules="all-linear"), GRAPH).modules) == NAMES


def test_layers_are_told_by_the_whole_number() -> None:
    found = match(Targets(target_modules=("q_proj",), layers_to_transform=1), GRAPH).modules
    assert found == ("model.layers.1.attn.q_proj", "model.layers.1.mlp.q_proj")


def test_nothing_matched_names_what_is_near_and_what_held_it_back() -> None:
    with pytest.raises(TargetError, match=r"(?s)'q_prj'.*none of.*q_proj"):
        match(Targets(target_modules=("q_prj",)), GRAPH)
    with pytest.raises(TargetError, match=r"layers_to_transform=\(7,\)"):
        match(Targets(target_modules=("q_proj",), layers_to_transform=(7,)), GRAPH)
    with pytest.raises(TargetError, match="every module is excluded"):
        match(Targets(target_modules=("q_proj",), exclude_modules=".*"), GRAPH)


def test_an_entry_that_matches_nothing_is_a_note_and_no_error() -> None:
    found = match(Targets(target_modules=("q_proj", "nowhere"), exclude_modules=("neither",)), GRAPH)
    assert any("'nowhere'" in note for note in found.notes)
    assert any("exclude_modules" in note for note in found.notes)


def test_a_method_refuses_kinds_it_does_not_work_on() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"model\.norm"):
        match(Targets(target_modules=("norm",)), GRAPH, kinds={"linear"})


def test_modules_to_save_keeps_the_adapter_away() -> None:
    found = match(Targets(target_modules=("q_proj",), modules_to_save=("mlp",)), GRAPH)
    assert not [name for name in found.modules if "mlp" in name]
    assert list(found.saved) == ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.10.mlp"]


@pytest.mark.parametrize(
    ("field", "value"), [("modules_to_save", "head"), ("target_parameters", "w"), ("target_modules", 3), ("layers_to_transform", "1")]
)
def test_a_value_of_the_wrong_type_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Targets(**{field: value})


def test_a_list_from_json_is_the_same_as_a_tuple() -> None:
    assert Targets(target_modules=["a"], layers_to_transform=[1]) == Targets(target_modules=("a",), layers_to_transform=(1,))


def test_a_convolution_is_exact_only_when_its_geometry_is_given() -> None:
    arrays = {"body.conv.weight": np.zeros((4, 2, 3, 3))}
    layer = Conv(in_channels=4, out_channels=4, kernel_size=(3, 3), stride=(2, 2), groups=2)
    assert not MappingGraph(arrays=arrays).modules()["body.conv"].exact
    given = MappingGraph(arrays=arrays, layers={"body.conv": layer}).modules()["body.conv"]
    assert given.exact
    assert given.layer == layer
    with pytest.raises(TargetError, match="expected"):
        _ = MappingGraph(arrays=arrays, layers={"body.conv": Conv(in_channels=4, out_channels=4, kernel_size=(3, 3))}).modules()


def test_a_tied_parameter_reads_as_the_first() -> None:
    graph = MappingGraph(arrays={"emb.weight": np.ones((3, 2))}, ties={"lm_head.weight": "emb.weight"})
    assert graph.weight("lm_head.weight") is graph.weight("emb.weight")
    assert graph.modules()["lm_head"].kind == "linear"
    with pytest.raises(KeyMismatchError):
        graph.weight("nowhere")
