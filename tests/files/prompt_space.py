"""Random configurations of prompts for a small model, right and wrong, as config_space.py has them for methods on weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.methods.config_words import NUMBERS, SWITCH

# Files that the tests make, under the names that a configuration calls them by.
TOKENIZER, SOURCE, PICKLED, NOWHERE = "tokenizer", "source.safetensors", "source.bin", "nowhere.safetensors"

STARTS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "PREFIX_TUNING": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM", "prefix_projection": True},
    "P_TUNING": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM", "encoder_reparameterization_type": "LSTM"},
    "MULTITASK_PROMPT_TUNING": {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "CARTRIDGE": {"peft_type": "CARTRIDGE", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"},
    "CPT": {"peft_type": "CPT", "cpt_token_ids": [5, 2, 7], "task_type": "CAUSAL_LM"},
}
SIZES: list[Any] = [*NUMBERS, None, None, 6, 12]
COMMON: dict[str, list[Any]] = {
    "num_virtual_tokens": NUMBERS,
    "token_dim": SIZES,
    "num_transformer_submodules": [None, None, 1, 2, 3, 0, -1, "1", 1.0, True],
    "num_attention_heads": SIZES,
    "num_layers": SIZES,
    "modules_to_save": [None, [], ["lm_head"], ["none"], "lm_head", ["q_proj"], [1], 3],
    "task_type": [None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "TOKEN_CLS", "COOKING", "causal_lm", "", 1],
    "inference_mode": [True, False, None, 0, 1, "no", []],
    "revision": [None, "main"],
    "base_model_name_or_path": [None, "a/b", ""],
    "peft_version": ["0.99.0", None],
}
TEXTS: dict[str, list[Any]] = {
    "prompt_tuning_init_text": [None, "", "say it", 3],
    "tokenizer_name_or_path": [None, "", TOKENIZER],
    "tokenizer_kwargs": [None, {}, {"padding_side": "left"}, "left", 3],
}
INITS: list[Any] = ["RANDOM", "SAMPLE_VOCAB", "TEXT", "random", "MAGIC", "", None, 3]
OF_THREE: list[Any] = [
    None,
    [1, 2, 3],
    [4, -3, 0],
    [1, 2],
    [],
    [1.5, 1, 1],
    ["1", 1, 1],
    [True, 1, 1],
    "abc",
    3,
    [[1], [1], [1]],
    [99, 1, 1],
]
FROM_SOURCE: list[Any] = ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"]
SPACE: dict[str, dict[str, list[Any]]] = {
    "PROMPT_TUNING": COMMON | TEXTS | {"prompt_tuning_init": INITS},
    "PREFIX_TUNING": COMMON
    | {
        "prefix_projection": SWITCH,
        "encoder_hidden_size": SIZES,
        "init_weights": [None, "zero", "Zero", "one", "", True, 0],
    },
    "P_TUNING": COMMON
    | {
        "encoder_reparameterization_type": ["MLP", "LSTM", "mlp", "GRU", "", None, 3],
        "encoder_hidden_size": SIZES,
        "encoder_num_layers": [*NUMBERS[:-1]],
        "encoder_dropout": [0.0, 0, 0.1, 0.999, 1, 1.0, 1.5, -0.1, None, "0.1", True],
    },
    "CARTRIDGE": COMMON | {"num_frozen_tokens": [0, 1, 2, 3, 4, -1, None, "1", 1.0, True, []]},
    "CPT": COMMON
    | {
        "cpt_token_ids": OF_THREE,
        "cpt_mask": OF_THREE,
        "cpt_tokens_type_mask": OF_THREE,
        "opt_weighted_loss_type": ["none", "decay", "Decay", "", None, 3],
        "opt_loss_decay_factor": [1.0, 1, 0.5, 0, -1.0, None, "0.5", True],
        "opt_projection_epsilon": [0.1, 1, 0, -0.1, None, "0.1", True],
        "opt_projection_format_epsilon": [0.1, 1, 0, -0.1, None, "0.1", True],
        "tokenizer_name_or_path": [None, "", TOKENIZER, 3],
    },
    "MULTITASK_PROMPT_TUNING": COMMON
    | TEXTS
    | {
        "prompt_tuning_init": [*INITS, *FROM_SOURCE, *FROM_SOURCE],
        "prompt_tuning_init_state_dict_path": [None, SOURCE, PICKLED, NOWHERE, "", 3],
        "prompt_tuning_init_task": [0, 1, 2, -1, None, "1", True, 1.0],
        "num_ranks": [*NUMBERS[:-1]],
        "num_tasks": [*NUMBERS[:-1]],
    },
}


def random_prompt_config(rng: np.random.Generator) -> dict[str, Any]:
    kind = str(rng.choice(list(STARTS)))
    space = SPACE[kind]
    words = list(space)
    data = dict(STARTS[kind])
    for i in rng.permutation(len(words))[: rng.integers(0, 4)]:
        values = space[words[i]]
        data[words[i]] = values[rng.integers(len(values))]
    if data.get("prompt_tuning_init") in FROM_SOURCE and rng.integers(2):
        data["prompt_tuning_init_state_dict_path"] = SOURCE
    if data.get("prompt_tuning_init") == "TEXT" and rng.integers(2):
        data = {"prompt_tuning_init_text": "say it", "tokenizer_name_or_path": TOKENIZER} | data
    return data


def every_single_prompt_change() -> list[dict[str, Any]]:
    """Each value of each word alone, and of what belongs to a start from a text or another adapter."""
    alone = [{**start, word: value} for kind, start in STARTS.items() for word, values in SPACE[kind].items() for value in values]
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "say it", "tokenizer_name_or_path": TOKENIZER}
    texts = [{**STARTS["PROMPT_TUNING"], **text, word: value} for word, values in TEXTS.items() for value in values]
    source = {**STARTS["MULTITASK_PROMPT_TUNING"], "prompt_tuning_init_state_dict_path": SOURCE}
    words = ("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "num_tasks", "num_ranks", "num_virtual_tokens")
    space = SPACE["MULTITASK_PROMPT_TUNING"]
    sources = [{**source, "prompt_tuning_init": init, word: value} for init in FROM_SOURCE for word in words for value in space[word]]
    mlp = {**STARTS["P_TUNING"], "encoder_reparameterization_type": "MLP"}
    mlps = [{**mlp, word: value} for word in ("encoder_num_layers", "encoder_dropout") for value in SPACE["P_TUNING"][word]]
    saved = [
        {**start, "inference_mode": True, word: value}
        for kind, start in STARTS.items()
        for word in OWN[kind]
        for value in SPACE[kind][word]
    ]
    flat = [
        {**STARTS["PREFIX_TUNING"], "prefix_projection": False, word: value}
        for word in OWN["PREFIX_TUNING"]
        for value in SPACE["PREFIX_TUNING"][word]
    ]
    return [*alone, *texts, *sources, *mlps, *saved, *flat]


OWN = {kind: tuple(word for word in words if word not in COMMON) for kind, words in SPACE.items()}
