"""Random adapter configurations for a small model, right and wrong: what PEFT and we are both asked about.

A configuration starts from one that is right, and up to three of its words are changed to values that some version of somebody might write:
other kinds of value, values out of range, words that contradict each other, names that match nothing.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np


class Difference(NamedTuple):
    """What somebody refuses alone."""

    who: str  # "we" or "PEFT"
    message: str  # a regex
    why: str


STARTS: dict[str, dict[str, Any]] = {
    "LORA": {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q", "up"]},
    "LOHA": {"peft_type": "LOHA", "r": 4, "alpha": 6, "target_modules": ["q", "up"]},
    "HRA": {"peft_type": "HRA", "r": 4, "target_modules": ["q", "up"]},
    "OFT": {"peft_type": "OFT", "oft_block_size": 3, "target_modules": ["q", "up"]},
    "ROAD": {"peft_type": "ROAD", "group_size": 2, "target_modules": ["q"]},
    "IA3": {"peft_type": "IA3", "target_modules": ["q", "up"], "feedforward_modules": ["up"]},
}
NAMES: list[Any] = [["q"], ["layers.0.q"], ["q", "conv2"], ["table"], ["conv1"], ["conv3", "q"], ["head"], ["none"], ["q", "none"], []]
REGEXES: list[Any] = ["q", r".*\.q", r"layers\.\d\.(q|up)", "all-linear", "ALL-LINEAR", "(q", "", "dummy-target-modules"]
INITS: list[Any] = ["gaussian", "Gaussian", "olora", "OLoRA", "pissa", "PISSA", "pissa_niter_2", "pissa_niter_x", "pissa_x", "orthogonal"]
MORE_INITS: list[Any] = ["Orthogonal", "eva", "lora_ga", "mica", "corda", "loftq", "magic", "", True, False, None, 0, 1]
RANKS: list[Any] = [2, 3, 0, -1, "2", 2.0, None, True]
TARGETS: dict[str, list[Any]] = {
    "target_modules": [*NAMES, *REGEXES, None, 3, [1], {"q": 1}, ["q", 1]],
    "exclude_modules": [None, [], ["up"], ["q", "up"], r".*\.up", "(q", 3, [1], ["layers.1.q"]],
    "modules_to_save": [None, [], ["head"], ["none"], "head", ["q"], [1], ["(head"], 3],
    "task_type": [None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "COOKING", "causal_lm", "", 1],
    "inference_mode": [True, False],
    "revision": [None, "main"],
    "base_model_name_or_path": [None, "a/b", ""],
    "peft_version": ["0.99.0", None],
}
LAYERS: dict[str, list[Any]] = {
    "layers_to_transform": [None, 0, 1, [0], [0, 1], [], [7], 7, -1, "0", ["0"], [None], True, [0.0]],
    "layers_pattern": [None, "layers", ["layers"], [], "", "h", "(layers", 3, ["layers", "h"]],
}
PATTERNS: dict[str, list[Any]] = {
    "rank_pattern": [*({"q": r} for r in RANKS), {r"layers\.1\.q": 6}, {"(q": 2}, {"none": 0}, {}, [], ["q"], None, "q"],
    "alpha_pattern": [{}, {"q": 2}, {"q": 0.5}, {"q": 0}, {"q": -1}, {"q": "2"}, {"q": None}, {"(q": 2}, {"none": "2"}, [], ["q"], None, 3],
}
NUMBERS: list[Any] = [1, 2, 3, 8, 0, -1, "8", None, 4.0, 2.5, True, [4], 1000]
SWITCH: list[Any] = [True, False, None, "yes", "", 1, 0, []]
SPACE: dict[str, dict[str, list[Any]]] = {
    "LORA": TARGETS
    | LAYERS
    | PATTERNS
    | {
        "r": NUMBERS,
        "lora_alpha": [*NUMBERS, 0.5, -2.5, 1e-7],
        "lora_dropout": [0.0, 0, 0.1, 0.999, 1, 1.0, 1.5, -0.1, None, "0.1", True],
        "use_rslora": SWITCH,
        "use_dora": SWITCH,
        "lora_bias": SWITCH,
        "fan_in_fan_out": [True, False],
        "bias": ["none", "all", "lora_only", "some_only", "some", "", None, True],
        "init_lora_weights": [*INITS, *MORE_INITS],
        "megatron_config": [None, {}, {"a": 1}],
        "target_parameters": [None, [], "q.weight"],
        "use_qalora": [False, None],
        "loftq_config": [{}, None, {"loftq_bits": 4}],
        "eva_config": [None, {"rho": 2.0}, {"rho": 0.5}, 3],
        "ensure_weight_tying": [False],
        "enable_lora": [None, [True, False, True]],
    },
    "LOHA": TARGETS
    | LAYERS
    | PATTERNS
    | {
        "r": NUMBERS,
        "alpha": [*NUMBERS, 0.5, -2.5],
        "init_weights": SWITCH,
        "rank_dropout": [0.0, 0.5, 1.5, -1, None, "0.1"],
        "module_dropout": [0.0, 0.5, 1.5, None, "0.1"],
        "use_effective_conv2d": [False, None],
    },
    "HRA": TARGETS
    | LAYERS
    | {
        "r": NUMBERS,
        "apply_GS": SWITCH,
        "init_weights": SWITCH,
        "bias": ["none", "all", "hra_only", "some_only", "some", "", None, True],
    },
    "OFT": TARGETS
    | LAYERS
    | {
        "r": [0, *NUMBERS],
        "oft_block_size": NUMBERS,
        "module_dropout": [0.0, 0.5],
        "coft": SWITCH,
        "eps": [6e-5, 0.5, 1, None, "1"],
        "block_share": SWITCH,
        "use_cayley_neumann": SWITCH,
        "num_cayley_neumann_terms": [5, 1, 3, 0],
        "init_weights": [True, False],
        "fan_in_fan_out": [True, False],
    },
    "ROAD": {word: values for word, values in TARGETS.items() if word != "exclude_modules"}
    | {
        "variant": ["road_1", "road_2", "road_4", "road_3", "", None, 1],
        "group_size": [2, 10, 4, 3, 0, -2, 64, "2", None],
        "init_weights": [True, False],
    },
    "IA3": TARGETS
    | {
        "feedforward_modules": [None, [], ["up"], ["q"], ["w"], r".*\.up", "(up", 3, [1], ["layers.0.up"], "up", {}],
        "init_ia3_weights": SWITCH,
        "fan_in_fan_out": [True, False],
    },
}


def random_config(rng: np.random.Generator) -> dict[str, Any]:
    kind = str(rng.choice(["LORA", "LORA", "LORA", "LOHA", "IA3", "HRA", "OFT", "ROAD"]))
    space = SPACE[kind]
    words = list(space)
    data = dict(STARTS[kind])
    for i in rng.permutation(len(words))[: rng.integers(0, 4)]:
        values = space[words[i]]
        data[words[i]] = values[rng.integers(len(values))]
    return data


def every_single_change() -> list[dict[str, Any]]:
    """Each value of each word alone, so that none is left to chance."""
    return [{**start, word: value} for kind, start in STARTS.items() for word, values in SPACE[kind].items() for value in values]


def looked_at_by_none() -> list[dict[str, Any]]:
    """Wrong values that no module of the model asks for."""
    nowhere = {**STARTS["LORA"], "target_modules": "dummy-target-modules"}
    values: dict[str, Any] = {"r": 0, "lora_alpha": "8", "lora_dropout": None, "init_lora_weights": "magic", "rank_pattern": ["q"]}
    odd = {**nowhere, "r": 3, "init_lora_weights": "orthogonal"}
    full = {**STARTS["LORA"], "target_modules": ["layers.0.q"], "layers_to_transform": ["0"]}
    return [*({**nowhere, word: value} for word, value in values.items()), odd, full]


def explained(differences: tuple[Difference, ...], data: dict[str, Any], peft_says: Any, we_say: Any) -> Difference:
    """The row that says why one refuses and the other does not."""
    who, refusal = ("we", we_say) if isinstance(we_say, str) else ("PEFT", peft_says)
    rows = [d for d in differences if d.who == who and re.search(d.message, refusal)]
    assert rows, f"{data}\n  PEFT: {peft_says}\n  we:   {we_say}"
    return rows[0]
