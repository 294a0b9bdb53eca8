"""The tables of default targets, and what configurations refuse, are PEFT's; the fixed words are PEFT's too."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytestmark = pytest.mark.hf

import peft  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402
from peft.utils import constants  # noqa: E402

from peft_ref.errors import TargetError  # noqa: E402
from peft_ref.graph import MappingGraph, TorchGraph, defaults, match, rules  # noqa: E402
from peft_ref.graph.targets import DUMMY, Targets, is_feedforward  # noqa: E402

from . import models, write_defaults  # noqa: E402


def test_the_installed_peft_is_the_one_the_tables_are_of() -> None:
    assert peft.__version__ in (defaults.__doc__ or "")


@pytest.mark.parametrize("method", write_defaults.default_targets())
def test_default_targets_are_pefts(method: str) -> None:
    assert defaults.DEFAULT_TARGETS[method] == write_defaults.default_targets()[method]


def test_no_method_is_missing_and_none_too_many() -> None:
    assert defaults.DEFAULT_TARGETS.keys() == write_defaults.default_targets().keys()
    assert {"LORA", "IA3", "ADALORA", "LOHA", "OSF", "LN_TUNING", "BEFT"} <= defaults.DEFAULT_TARGETS.keys()


def test_every_method_of_peft_has_a_table_or_a_reason_for_none() -> None:
    assert defaults.DEFAULT_TARGETS.keys() | rules.WITHOUT_TARGETS.keys() == {kind.value for kind in peft.PeftType}
    assert not defaults.DEFAULT_TARGETS.keys() & rules.WITHOUT_TARGETS.keys()
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        assert (kind.value in rules.WITHOUT_TARGETS) <= (not hasattr(tuner, "target_module_mapping")), kind


def test_no_table_of_peft_is_left_out() -> None:
    """Its own list of tables, which a tuner may have forgotten to use."""
    named = re.compile(r"TRANSFORMERS_MODELS_TO_(\w+)_TARGET_MODULES_MAPPING")
    tables = {m[1]: getattr(constants, m[0]) for name in dir(constants) if (m := named.fullmatch(name))}
    assert len(tables) > 30
    others = {name for name in dir(constants) if name.startswith("TRANSFORMERS_MODELS_TO_") and not named.fullmatch(name)}
    beside = ("IA3_FEEDFORWARD_MODULES", "PREFIX_TUNING_POSTPROCESS")
    assert others == {f"TRANSFORMERS_MODELS_TO_{name}_MAPPING" for name in beside}
    for name, table in tables.items():
        method = {"LNTUNING": "LN_TUNING"}.get(name, name)
        assert defaults.DEFAULT_TARGETS[method] == write_defaults.frozen(table), name


def test_a_method_without_targets_says_where_it_goes() -> None:
    graph = MappingGraph(arrays={}, model_config={"model_type": "llama"})
    with pytest.raises(TargetError, match="XLORA has no default target_modules: it routes between LoRA adapters"):
        match(Targets(), graph, peft_type="XLORA")


def test_feedforward_defaults_are_pefts() -> None:
    assert write_defaults.feedforward() == defaults.FEEDFORWARD


def test_the_projections_of_adaption_prompts_are_pefts() -> None:
    assert write_defaults.projections() == defaults.ADAPTION_PROJECTIONS
    assert defaults.ADAPTION_PROJECTIONS.keys() == defaults.DEFAULT_TARGETS["ADAPTION_PROMPT"].keys()


def test_the_architectures_whose_prefixes_are_put_into_another_order_are_pefts() -> None:
    assert write_defaults.postprocessed() == defaults.PREFIX_POSTPROCESSED
    assert constants.TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING.keys() <= defaults.PREFIX_POSTPROCESSED


def test_the_refused_combinations_are_pefts() -> None:
    for name, methods in write_defaults.refusals().items():
        assert getattr(defaults, name) == methods, name


def test_fixed_words_are_pefts() -> None:
    assert DUMMY == constants.DUMMY_TARGET_MODULES
    assert rules.ALL_LINEAR == constants.INCLUDE_LINEAR_LAYERS_SHORTHAND
    assert list(rules.SEQ_CLS_HEADS) == constants.SEQ_CLS_HEAD_NAMES
    assert rules.MANY == constants.MIN_TARGET_MODULES_FOR_OPTIMIZATION


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_ia3_takes_for_feedforward_what_peft_takes(name: str) -> None:
    import copy

    wrapped = peft.get_peft_model(copy.deepcopy(models.model(name)), peft.IA3Config()).base_model.model
    ends = rules.default_feedforward(TorchGraph(models.model(name)))
    theirs = {n: m.is_feedforward for n, m in wrapped.named_modules() if hasattr(m, "is_feedforward")}
    assert theirs
    assert {n: is_feedforward(ends, n) for n in theirs} == theirs


def test_an_unknown_architecture_has_no_default() -> None:
    graph = MappingGraph(arrays={}, model_config={"model_type": "none-such"})
    assert rules.default_targets(graph, "LORA") is None
    with pytest.raises(TargetError, match="none-such"):
        rules.default_feedforward(graph)
