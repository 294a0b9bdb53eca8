"""The configuration classes have PEFT's fields, defaults and files, and read each other's."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

import peft  # noqa: E402

from peft_ref import hf  # noqa: E402
from peft_ref.errors import ConfigError, FileFormatError  # noqa: E402
from peft_ref.methods import METHODS  # noqa: E402
from tests.methods import facts  # noqa: E402

CLASSES = {cls.__name__: cls for cls in hf.PEFT_TYPE_TO_CONFIG_MAPPING.values()}
NEEDED: dict[str, dict[str, Any]] = {"AdaLoraConfig": {"total_step": 9}, "CPTConfig": {"task_type": "CAUSAL_LM"}}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "LoraConfig": [
        {"r": 3, "target_modules": ["q"], "task_type": "CAUSAL_LM", "rank_pattern": {"a": 3, "b": 4}, "alpha_pattern": {"b": 2.5}},
        {"use_dora": True, "target_modules": "all-linear", "modules_to_save": ["a", "b"], "bias": "all", "revision": "main"},
        {"init_lora_weights": "pissa", "target_modules": "q|v", "exclude_modules": ["k"], "lora_bias": False, "use_rslora": True},
        {"kasa_config": {"beta": 0.5}, "target_modules": ["q"]},
        {"velora_config": {"num_groups": 4}, "target_modules": ["q"]},
        {"monteclora_config": {"num_samples": 3, "use_entropy": True}, "target_modules": ["q"]},
        {"use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": 2, "match_strict": False}, "target_modules": ["q"]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers", "target_modules": ["q"], "base_model_name_or_path": "x"},
    ],
    "AdaLoraConfig": [{"deltaT": 2, "tinit": 1, "tfinal": 2, "orth_reg_weight": 0.1}],
    "IA3Config": [{"target_modules": ["a"], "feedforward_modules": ["a"]}],
    "LoHaConfig": [{"r": 2, "rank_dropout": 0.5, "target_modules": ["a"]}],
    "LoKrConfig": [{"r": 2, "rank_dropout": 0.5, "decompose_both": True, "target_modules": ["a"]}, {"init_weights": "lycoris"}],
    "HiraConfig": [{"r": 2, "hira_dropout": 0.5, "init_weights": "gaussian", "target_modules": ["a"], "rank_pattern": {"a": 3}}],
    "GraloraConfig": [{"r": 4, "hybrid_r": 2, "gralora_k": 4, "bias": "all", "target_modules": ["a"]}],
    "MissConfig": [{"r": 2, "target_modules": ["a"]}, {"r": 2, "mini_r": 2, "init_weights": "mini"}, {"r": 2, "init_weights": "bat"}],
    "PromptTuningConfig": [
        {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": "b", "num_virtual_tokens": 2},
        {"prompt_tuning_init": "SAMPLE_VOCAB", "task_type": "SEQ_CLS", "modules_to_save": ["a"]},
    ],
    "PrefixTuningConfig": [{"prefix_projection": True, "encoder_hidden_size": 3}],
    "PromptEncoderConfig": [{"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3, "num_layers": 1}],
    "AdaptionPromptConfig": [{"adapter_len": 3, "adapter_layers": 2, "target_modules": "attn"}],
    "CartridgeConfig": [{"num_virtual_tokens": 3, "num_frozen_tokens": 2}],
    "CPTConfig": [{"cpt_token_ids": [3, 1], "cpt_tokens_type_mask": [1, 4], "opt_weighted_loss_type": "decay"}],
    "MultitaskPromptTuningConfig": [{"num_tasks": 3, "prompt_tuning_init": "ONLY_SOURCE_SHARED"}],
}
# Of classes without a row of their own, those of the quick tour.
TOURED = {tour.config: [dict(tour.options)] for name in METHODS.weights if (tour := facts(name).tour)}
CASES = [(name, {**NEEDED.get(name, {}), **options}) for name in CLASSES for options in ({}, *OPTIONS.get(name, TOURED.get(name, [])))]


def test_every_method_has_a_class() -> None:
    assert hf.PEFT_TYPE_TO_CONFIG_MAPPING.keys() == {cls.peft_type for cls in METHODS.values()}


@pytest.mark.parametrize("name", [*CLASSES, "PeftConfig", "PromptLearningConfig"])
def test_fields_and_defaults_are_pefts(name: str) -> None:
    ours, theirs = fields(getattr(hf, name)), fields(getattr(peft, name))
    default = {f.name: f.default if f.default_factory is not dict else dict for f in ours}
    expected = {f.name: f.default if f.default_factory is not dict else dict for f in theirs if f.name != "runtime_config"}
    assert default == expected


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_configuration_is_written_to_the_byte_and_read_on_both_sides(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = getattr(peft, name)(**options), CLASSES[name](**options)
    assert ours.is_prompt_learning == theirs.is_prompt_learning
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "adapter_config.json").read_bytes() == (tmp_path / "theirs" / "adapter_config.json").read_bytes()
    read = hf.PeftConfig.from_pretrained(tmp_path, subfolder="theirs")
    assert type(read) is type(ours)
    assert read == ours
    assert hf.get_peft_config(theirs.to_dict()).to_dict() == ours.to_dict()
    assert peft.PeftConfig.from_pretrained(tmp_path / "ours") == theirs


def test_the_version_is_pefts_where_none_is_said_and_the_one_that_was_said_else() -> None:
    for side in (peft, hf):
        assert side.LoraConfig().peft_version == side.LoraConfig(peft_version=None).peft_version == peft.__version__
        assert side.LoraConfig(peft_version="0.1").peft_version == "0.1"


def test_words_are_pefts() -> None:
    for name in ("PromptTuningInit", "MultitaskPromptTuningInit", "PromptEncoderReparameterizationType", "TaskType", "PeftType"):
        assert {str(m.value): m.name for m in getattr(hf, name)} == {str(m.value): m.name for m in getattr(peft, name)}


def test_a_folder_without_a_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"has no adapter_config\.json"):
        hf.PeftConfig.from_pretrained(tmp_path)


WITHIN = {
    "kasa_config": "KasaConfig",
    "velora_config": "VeloraConfig",
    "monteclora_config": "MontecloraConfig",
    "use_bdlora": "BdLoraConfig",
}


@pytest.mark.parametrize("field", WITHIN)
def test_what_stands_within_a_configuration_is_pefts_too(field: str, tmp_path: Path) -> None:
    """Its fields and defaults; given as one of its class, as a map, or read from PEFT's file."""
    theirs, ours = getattr(peft, WITHIN[field]), getattr(hf, WITHIN[field])
    assert {f.name: f.default for f in fields(ours)} == {f.name: f.default for f in fields(theirs)}
    expected = hf.LoraConfig(**{field: ours()})
    peft.LoraConfig(**{field: theirs()}).save_pretrained(tmp_path)
    for config in (hf.LoraConfig(**{field: {}}), hf.PeftConfig.from_pretrained(tmp_path)):
        assert getattr(config, field) == getattr(expected, field) == ours()
    assert expected.to_dict()[field] == peft.LoraConfig(**{field: theirs()}).to_dict()[field]


@pytest.mark.parametrize("field", WITHIN)
def test_a_key_that_is_none_of_them_is_an_error(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} has no betta"):
        hf.LoraConfig(**{field: {"betta": 1}})


def test_what_cannot_be_within_a_configuration_says_where() -> None:
    with pytest.raises(ConfigError, match=r"LoraConfig: kasa_config: .*beta"):
        hf.LoraConfig(kasa_config={"beta": -1.0})
    with pytest.raises(ConfigError, match="kasa_config=3"):
        hf.LoraConfig(kasa_config=3)  # type: ignore[arg-type]


def test_the_first_pattern_wins_before_and_after_a_configuration_is_saved(tmp_path: Path) -> None:
    """PEFT sorts patterns when it writes them: then another one is the first, and its own adapter no longer fits."""
    patterns = {"q|v": 3, "q": 5}
    for side, name in ((peft, "theirs"), (hf, "ours")):
        side.LoraConfig(target_modules=["q", "v"], rank_pattern=patterns).save_pretrained(tmp_path / name)
    assert list(peft.PeftConfig.from_pretrained(tmp_path / "theirs").rank_pattern) == ["q", "q|v"]
    read = hf.PeftConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(read, hf.LoraConfig)
    assert list(read.rank_pattern or {}) == ["q|v", "q"]
