"""What older and newer versions of PEFT wrote still loads, means what the installed PEFT reads in it, and is written back to the byte."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from peft_ref.errors import ConfigError, FileFormatError
from peft_ref.files.adapter import CONFIG, load_config
from peft_ref.files.config import from_dict, render
from peft_ref.files.rules import field_names
from peft_ref.methods import IA3, METHODS, DoRA, LoHa, LoRA, PromptTuning, method_class

# LoRA's configuration grew release by release: the keys that came, and the value that was written when nobody said anything.
FIRST: dict[str, Any] = {
    "base_model_name_or_path": "decapoda-research/llama-7b-hf",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
GONE = {"0.3": ("enable_lora", "merge_weights")}
CAME: dict[str, dict[str, Any]] = {
    "0.2": {},
    "0.3": {"init_lora_weights": True},
    "0.4": {"auto_mapping": None, "layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {"q_proj": 4}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": True},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.17": {"qalora_group_size": 16, "target_parameters": None, "use_qalora": False},
    "0.18": {"alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.0"},
    "newer": {"peft_version": "1.7.0", "from_the_future": {"a": [1, None]}, "another_switch": False},
}


def history() -> dict[str, dict[str, Any]]:
    config, written = dict(FIRST), {}
    for version, new in CAME.items():
        config = {key: value for key, value in config.items() if key not in GONE.get(version, ())} | new
        written[f"LORA {version}"] = dict(sorted(config.items()))
    later = {"auto_mapping": None, "base_model_name_or_path": "a/b", "inference_mode": True, "revision": None, "task_type": None}
    more = {"layers_pattern": None, "layers_to_transform": None, "modules_to_save": None, "target_modules": ["to_q"]}
    written["DORA 0.9"] = written["LORA 0.9"] | {"use_dora": True}
    written["IA3 0.4"] = later | {
        "fan_in_fan_out": False,
        "feedforward_modules": ["w0"],
        "init_ia3_weights": True,
        "modules_to_save": None,
        "peft_type": "IA3",
        "target_modules": ["k", "w0"],
    }
    written["LOHA 0.6"] = (
        later
        | more
        | {
            "alpha": 4,
            "alpha_pattern": {},
            "init_weights": True,
            "module_dropout": 0.0,
            "peft_type": "LOHA",
            "r": 8,
            "rank_dropout": 0.0,
            "rank_pattern": {},
            "use_effective_conv2d": False,
        }
    )
    written |= prompts()
    written["LORA with what was saved for a time"] = written["LORA 0.10"] | {"runtime_config": {"ephemeral_gpu_offload": False}}
    return written


def prompts() -> dict[str, dict[str, Any]]:
    """A prompt's configuration as the first versions wrote it, and what came to it."""
    sizes = {"num_attention_heads": 12, "num_layers": 12, "num_transformer_submodules": 1, "num_virtual_tokens": 20, "token_dim": 768}
    first = {"base_model_name_or_path": "a/b", "inference_mode": True, "task_type": "CAUSAL_LM", **sizes}
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Is it so?", "tokenizer_name_or_path": "a/b"}
    encoder = {"encoder_dropout": 0.0, "encoder_hidden_size": 128, "encoder_num_layers": 2, "encoder_reparameterization_type": "MLP"}
    source = {"prompt_tuning_init_state_dict_path": None, "prompt_tuning_init_task": 0, "num_ranks": 1, "num_tasks": 3}
    own: dict[str, dict[str, Any]] = {
        "PROMPT_TUNING": text,
        # 0.2 had a field for a function, which JSON cannot hold
        "PREFIX_TUNING": {"encoder_hidden_size": 768, "prefix_projection": True, "postprocess_past_key_value_function": None},
        "P_TUNING": encoder,
        "MULTITASK_PROMPT_TUNING": {**text, **source},
        "CPT": {
            "cpt_mask": [1] * 20,
            "cpt_token_ids": list(range(20)),
            "cpt_tokens_type_mask": [1, 2, 3, 4] * 5,
            "opt_loss_decay_factor": 0.95,
            "opt_projection_epsilon": 0.2,
            "opt_projection_format_epsilon": 0.1,
            "opt_weighted_loss_type": "decay",
            "tokenizer_name_or_path": "a/b",
        },
        "CARTRIDGE": {"num_frozen_tokens": 2},
    }
    came = {
        "0.2": {},
        "0.4": {"auto_mapping": None, "revision": None},
        "0.18": {"modules_to_save": None, "peft_version": "0.18.0"},
        "newer": {"peft_version": "1.7.0", "from_the_future": {"a": [1, None]}, "prompt_tuning_init": "FROM_A_DREAM"},
    }
    written = {}
    for kind, words in own.items():
        config: dict[str, Any] = {"peft_type": kind, **first, **words}
        for version, new in came.items():
            config = {k: v for k, v in config.items() if version == "0.2" or not k.startswith("postprocess")}
            config |= {k: v for k, v in new.items() if k != "prompt_tuning_init" or k in config}
            written[f"{kind} {version}"] = dict(sorted(config.items()))
    return written


HISTORY = history()
CLASSES = {"LORA": LoRA, "DORA": DoRA, "IA3": IA3, "LOHA": LoHa, **{cls.peft_type: cls for cls in METHODS.prompts.values()}}


def put(folder: Path, data: dict[str, Any]) -> str:
    text = json.dumps(data, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return text


@pytest.mark.parametrize("what", HISTORY)
def test_it_loads_and_is_written_back_to_the_byte(what: str, tmp_path: Path) -> None:
    text = put(tmp_path, HISTORY[what])
    config = load_config(tmp_path)
    assert type(config.method) is CLASSES[what.partition(" ")[0]]
    assert render(config) == text


@pytest.mark.hf
@pytest.mark.parametrize("what", HISTORY)
def test_it_means_what_peft_reads_in_it_and_keeps_what_peft_drops(what: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    data = HISTORY[what]
    put(tmp_path, data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftConfig.from_pretrained(str(tmp_path))
    config = load_config(tmp_path)
    # PEFT takes the sizes of CPT from the model, and forgets what the file says
    forgotten = {"token_dim", "num_layers", "num_attention_heads"} if what.startswith("CPT") else set()
    for name in set(field_names(type(config.method))) - {"is_feedforward"} - forgotten:
        assert getattr(config.method, name) == getattr(theirs, name), name
    assert set(config.targets.target_modules or ()) == getattr(theirs, "target_modules", set())
    dropped = {key for key in data if not hasattr(theirs, key)} | ({"runtime_config"} & data.keys())
    for key in dropped:
        assert any(key in str(w.message) for w in caught), f"PEFT drops {key} without a word"
        assert config.housekeeping[key] == data[key]
    assert bool(dropped) == (what.endswith("newer") or what in ("LORA 0.2", "PREFIX_TUNING 0.2", "LORA with what was saved for a time"))


@pytest.mark.hf
def test_a_new_word_inside_a_part_of_the_configuration_is_kept_too(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    text = put(tmp_path, {**HISTORY["LORA 0.18"], "init_lora_weights": "eva", "eva_config": {"rho": 3.0, "later": 1}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftConfig.from_pretrained(str(tmp_path)).eva_config
    assert theirs.rho == 3.0
    assert not hasattr(theirs, "later")
    assert render(load_config(tmp_path)) == text


def test_the_least_that_anybody_wrote_of_a_prompt_is_read() -> None:
    """As converters write it; PEFT takes the rest from the model."""
    config = from_dict({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20, "base_model_name_or_path": "a/b"})
    assert config.method == PromptTuning(num_virtual_tokens=20)


def test_a_start_as_peft_s_first_pages_spelt_it_is_read_once_it_is_saved() -> None:
    """They said "PromptTuningInit.TEXT", which PEFT takes for no start that it knows."""
    data = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20, "prompt_tuning_init": "PromptTuningInit.TEXT"}
    assert isinstance(from_dict({**data, "inference_mode": True}).method, PromptTuning)
    with pytest.raises(ConfigError, match=r"prompt_tuning_init='PromptTuningInit\.TEXT' is not known"):
        from_dict(data)


def test_a_merged_linear_of_peft_0_2_is_refused_and_not_read_as_lora() -> None:
    with pytest.raises(ConfigError, match=r"enable_lora=.*not built yet: PEFT 0\.2 adapted parts of a fused layer"):
        from_dict({**HISTORY["LORA 0.2"], "enable_lora": [True, False, True]})


def test_a_removed_method_is_refused_with_what_became_of_it() -> None:
    with pytest.raises(ConfigError, match=r"'BONE' is not built here\.\n  PEFT replaced it by MISS"):
        method_class("BONE")


def test_a_folder_without_a_configuration_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=rf"has no {CONFIG}.\n  Adapters there: none"):
        load_config(tmp_path)
    (tmp_path / "other").mkdir()
    put(tmp_path / "other", HISTORY["IA3 0.4"])
    assert type(load_config(tmp_path, "other").method) is IA3
