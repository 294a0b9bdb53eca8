"""Prompts' folders without PEFT: nothing is lost on the way, every tensor has a place or is an error that names it."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from peft_ref.errors import ConfigError, FileFormatError, KeyMismatchError, ShapeError
from peft_ref.files.adapter import CONFIG, FILES, WEIGHTS, AdapterFile, all_tensors, from_state_dict, load_adapter, save_adapter
from peft_ref.files.config import AdapterConfig, flatten, from_dict, parse, render
from peft_ref.files.keys import PROMPT_PREFIX, parameter_name
from peft_ref.files.safetensors import RawTensor, serialize
from peft_ref.graph.targets import Targets
from peft_ref.methods import METHODS, PrefixTuning, PromptTuning
from peft_ref.prompts import EMBEDDING, SAVED, Prompt

SIZES = {"num_virtual_tokens": 3, "token_dim": 4, "num_transformer_submodules": 1, "num_attention_heads": 2, "num_layers": 2}
PROMPT = {"peft_type": "PROMPT_TUNING", **SIZES}
PREFIX = {"peft_type": "PREFIX_TUNING", **SIZES}
TASKS = {"peft_type": "MULTITASK_PROMPT_TUNING", **SIZES, "num_tasks": 2, "num_ranks": 5}
TABLE = {SAVED: np.ones((3, 4))}
OF_TASKS = {**TABLE, "prefix_task_cols": np.ones((2, 3, 5)), "prefix_task_rows": np.ones((2, 5, 4))}
DTYPES = ("float64", "float32", "float16", ml_dtypes.bfloat16)


def method_of(config: AdapterConfig) -> Prompt:
    assert isinstance(config.method, Prompt)
    return config.method


def random_prompt(rng: np.random.Generator, name: str) -> AdapterFile:
    def size() -> int:
        return int(rng.integers(1, 6))

    heads = size()
    flat = {**SIZES, "num_virtual_tokens": size(), "token_dim": heads * size(), "num_attention_heads": heads, "num_layers": size()}
    more = {
        "prefix_tuning": {"prefix_projection": True, "encoder_hidden_size": 3},
        "p_tuning": {"encoder_reparameterization_type": str(rng.choice(["MLP", "LSTM"])), "encoder_hidden_size": 3},
        "multitask_prompt_tuning": {"num_tasks": size(), "num_ranks": size()},
        "cartridge": {"num_frozen_tokens": int(rng.integers(0, flat["num_virtual_tokens"] + 1))},
        "cpt": {"cpt_token_ids": [5, 3, 1, 2, 4][: flat["num_virtual_tokens"]], "opt_weighted_loss_type": "decay"},
    }.get(name, {})
    task = METHODS.prompts[name].only_task or "SEQ_CLS"
    flat |= {"peft_type": METHODS[name].peft_type, "num_transformer_submodules": int(rng.integers(1, 3)), "inference_mode": True, **more}
    saved = ["head"] if rng.integers(2) else None
    config = from_dict({**flat, "modules_to_save": saved, "task_type": task, "from_the_future": {"a": [None]}})
    dtype = np.dtype(DTYPES[rng.integers(len(DTYPES))])
    prompt = {key: rng.normal(size=shape).astype(dtype) for key, shape in method_of(config).shapes().items()}
    head = {f"{PROMPT_PREFIX}head.weight": rng.normal(size=(2, 3)).astype(dtype)} if saved else {}
    return AdapterFile(config=config, prompt=prompt, modules_to_save=head)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and (a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize("name", METHODS.prompts)
def test_random_prompts_survive_saving_and_loading(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    for i in range(30):
        adapter = random_prompt(rng, name)
        save_adapter(tmp_path / f"{i}", adapter)
        got = load_adapter(tmp_path / f"{i}")
        assert same(all_tensors(got), all_tensors(adapter))
        assert got.config == adapter.config
        assert got.config.housekeeping["from_the_future"] == {"a": [None]}
        save_adapter(tmp_path / f"{i}b", got)
        for file in FILES:
            assert (tmp_path / f"{i}b" / file).read_bytes() == (tmp_path / f"{i}" / file).read_bytes()


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "no table": (PROMPT, {}, KeyMismatchError, r"^prompt_embeddings missing, which PromptTuning saves.\n  Came: nothing"),
    "no table, but others": (TASKS, {**OF_TASKS, SAVED: None}, KeyMismatchError, r"^prompt_embeddings missing.*Came: prefix_task_cols, "),
    "no matrix of the tasks": (TASKS, {**OF_TASKS, "prefix_task_rows": None}, KeyMismatchError, r"^prefix_task_rows missing, which Multi"),
    "the encoder's own name": (PROMPT, {EMBEDDING: np.ones((3, 4))}, KeyMismatchError, r"'embedding\.weight' is no tensor of PromptTuning"),
    "another method's": (PROMPT, OF_TASKS, KeyMismatchError, r"'prefix_task_cols' is no tensor of PromptTuning, which saves prompt_embedd"),
    "LoRA's": (
        PROMPT,
        {**TABLE, "base_model.model.q.lora_A.weight": np.ones(2)},
        KeyMismatchError,
        r"lora_A\.weight' is no tensor.*Remove",
    ),
    "a module nobody named": (
        {**PROMPT, "modules_to_save": ["score"]},
        {**TABLE, "base_model.head.weight": np.ones(2)},
        KeyMismatchError,
        r"'base_model\.head\.weight' is no tensor.*modules_to_save=\['score'\]",
    ),
    "a module without its prefix": (
        {**PROMPT, "modules_to_save": ["head"]},
        {**TABLE, "head.weight": np.ones(2)},
        KeyMismatchError,
        r"'head\.weight' is no tensor.*base_model\.<module>\.weight",
    ),
    "more tokens": (
        PROMPT,
        {SAVED: np.ones((4, 4))},
        ShapeError,
        r"PromptTuning: prompt_embeddings is \(4, 4\), expected \(3, 4\).*virtual_tok",
    ),
    "another width": (PROMPT, {SAVED: np.ones((3, 8))}, ShapeError, r"prompt_embeddings is \(3, 8\), expected \(3, 4\)"),
    "half of two submodules": (
        {**PROMPT, "num_transformer_submodules": 2},
        TABLE,
        ShapeError,
        r"prompt_embeddings is \(3, 4\), expected \(6, 4\).*belongs to these tensors",
    ),
    "a prompt as a prefix": (PREFIX, TABLE, ShapeError, r"PrefixTuning: prompt_embeddings is \(3, 4\), expected \(3, 16\)"),
    "a table of one dimension": (PROMPT, {SAVED: np.ones(12)}, ShapeError, r"prompt_embeddings is \(12,\), expected \(3, 4\)"),
    "another number of tasks": ({**TASKS, "num_tasks": 3}, OF_TASKS, ShapeError, r"prefix_task_cols is \(2, 3, 5\), expected \(3, 3, 5\)"),
    "a dtype NumPy lacks": (PROMPT, {SAVED: RawTensor("F4", (3, 4), bytes(6))}, FileFormatError, r"prompt_embeddings is F4.*F32"),
    "no number of tokens": ({**PROMPT, "num_virtual_tokens": None}, TABLE, ConfigError, r"num_virtual_tokens is not given"),
    "a cartridge of fewer tokens": (
        {**PREFIX, "peft_type": "CARTRIDGE"},
        {SAVED: np.ones((2, 16))},
        ShapeError,
        r"Cartridge: prompt_embeddings is \(2, 16\), expected \(3, 16\)",
    ),
    "frozen and trained rows apart": (
        {**PREFIX, "peft_type": "CARTRIDGE"},
        {"frozen_embedding": np.ones((1, 16)), "trainable_embedding": np.ones((2, 16))},
        KeyMismatchError,
        r"'frozen_embedding' is no tensor of Cartridge, which saves prompt_embeddings",
    ),
    "as many words as tokens": (
        {**PROMPT, "peft_type": "CPT", "task_type": "CAUSAL_LM", "cpt_token_ids": [1, 2]},
        TABLE,
        ShapeError,
        r"CPT: prompt_embeddings is \(3, 4\), expected \(2, 4\)",
    ),
    "no sizes of a prefix": ({**PREFIX, "token_dim": None, "num_layers": None}, TABLE, ConfigError, r"token_dim is not given.*sized"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(what: str) -> None:
    config, tensors, error, message = WRONG[what]
    with pytest.raises(error, match=f"(?s){message}"):
        from_state_dict(from_dict(config), {key: value for key, value in tensors.items() if value is not None})


def test_other_tensors_are_kept_apart_under_the_model_s_names() -> None:
    others = {"score.weight": "modules_to_save", "bert.score.dense.bias": "modules_to_save", "model.embed_tokens.weight": "embeddings"}
    config = from_dict({**PROMPT, "modules_to_save": ["score"]})
    adapter = from_state_dict(config, {**TABLE, **{PROMPT_PREFIX + name: np.ones(2) for name in others}})
    for name, kind in others.items():
        assert PROMPT_PREFIX + name in getattr(adapter, kind)
        assert parameter_name(PROMPT_PREFIX + name, PROMPT_PREFIX) == name
    assert all_tensors(adapter).keys() == {SAVED, *(PROMPT_PREFIX + name for name in others)}


@pytest.mark.parametrize(
    ("config", "left_out", "table"),
    [
        (PROMPT, ("token_dim",), (3, 7)),
        (PROMPT, ("token_dim", "num_transformer_submodules"), (6, 7)),
        ({**PREFIX, "prefix_projection": True}, ("token_dim",), (3, 20)),
        (PREFIX, ("num_layers", "num_transformer_submodules", "num_attention_heads"), (3, 24)),
    ],
)
def test_sizes_that_the_configuration_leaves_to_the_model_are_those_of_the_table(
    config: dict[str, Any], left_out: tuple[str, ...], table: tuple[int, int], tmp_path: Path
) -> None:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / CONFIG).write_text(json.dumps({**config, **dict.fromkeys(left_out)}))
    (tmp_path / WEIGHTS).write_bytes(serialize({SAVED: np.ones(table)}, {"format": "pt"}))
    adapter = load_adapter(tmp_path)
    assert adapter.prompt[EMBEDDING].shape == table
    save_adapter(tmp_path / "again", adapter)
    for file in FILES:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_and_never_run(name: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    (tmp_path / CONFIG).write_text(json.dumps(PROMPT))
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileFormatError, match=rf"(?s){name}, a pickle.*runs whatever code.*sandbox"):
        load_adapter(tmp_path)
    (tmp_path / name).rename(tmp_path / WEIGHTS)
    with pytest.raises(FileFormatError):
        load_adapter(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_prompt_has_no_targets_and_no_module_of_its_own() -> None:
    config = from_dict({**PROMPT, "modules_to_save": ["head"]})
    assert config.targets == Targets(modules_to_save=("head",))
    with pytest.raises(ConfigError, match="PromptTuning adapts no layer"):
        config.method_for("h.0.q")


def test_a_new_configuration_reads_back_equal_and_a_change_is_written() -> None:
    config = AdapterConfig(method=PrefixTuning(num_virtual_tokens=3, prefix_projection=True), housekeeping={"task_type": "CAUSAL_LM"})
    text = render(config)
    assert parse(text) == config
    assert not {"target_modules", "rank_pattern", "feedforward_modules"} & json.loads(text).keys()
    assert list(json.loads(text)) == sorted(json.loads(text))
    data = {**PROMPT, "later": [1], "revision": None}
    read = from_dict(data)
    changed = dataclasses.replace(read, method=PromptTuning(num_virtual_tokens=9, token_dim=4, inference_mode=True))
    assert flatten(changed) == {
        **{key: value for key, value in data.items() if key not in ("num_layers", "num_attention_heads", "num_transformer_submodules")},
        **dict.fromkeys(("num_layers", "num_attention_heads", "num_transformer_submodules")),
        "num_virtual_tokens": 9,
        "inference_mode": True,
    }
