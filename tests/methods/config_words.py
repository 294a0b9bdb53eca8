"""Values of the words that several configurations share: what some version of somebody might write."""

from __future__ import annotations

from typing import Any

NAMES: list[Any] = [["q"], ["layers.0.q"], ["q", "conv2"], ["table"], ["conv1"], ["conv3", "q"], ["head"], ["none"], ["q", "none"], []]
REGEXES: list[Any] = ["q", r".*\.q", r"layers\.\d\.(q|up)", "all-linear", "ALL-LINEAR", "(q", "", "dummy-target-modules"]
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
OWN_TARGETS = {word: values for word, values in TARGETS.items() if word != "exclude_modules"}  # of methods that do not know the word
LAYERS: dict[str, list[Any]] = {
    "layers_to_transform": [None, 0, 1, [0], [0, 1], [], [7], 7, -1, "0", ["0"], [None], True, [0.0]],
    "layers_pattern": [None, "layers", ["layers"], [], "", "h", "(layers", 3, ["layers", "h"]],
}
PATTERNS: dict[str, list[Any]] = {
    "rank_pattern": [*({"q": r} for r in RANKS), {r"layers\.1\.q": 6}, {"(q": 2}, {"none": 0}, {}, [], ["q"], None, "q"],
    "alpha_pattern": [{}, {"q": 2}, {"q": 0.5}, {"q": 0}, {"q": -1}, {"q": "2"}, {"q": None}, {"(q": 2}, {"none": "2"}, [], ["q"], None, 3],
}
MODULES = ["q", "up", "layers.0.q", r"layers\.[01]\.up", r".*\.q", "conv2", "nothing"]


def pattern(rng: Any) -> dict[str, int]:
    """Some modules of `Net`, by several ways to name them, and their ranks."""
    return {MODULES[i]: int(rng.integers(1, 9)) for i in rng.permutation(len(MODULES))[: rng.integers(0, 4)]}


def random_word(rng: Any, *values: Any) -> Any:
    return values[rng.integers(len(values))]


def flip(rng: Any) -> bool:
    return bool(rng.integers(2))


SIZES: list[Any] = [
    *({"q": size} for size in (2, 1, 3, 0, -1, "2", None)),
    {r"layers\.1\.q": 2},
    {"layers.0.q": 2},
    {"q|up": 2},
    {"(q": 2},
    {"none": 0},
    {},
    [],
    ["q"],
    None,
    3,
]
NUMBERS: list[Any] = [1, 2, 3, 8, 0, -1, "8", None, 4.0, 2.5, True, [4], 1000]
SWITCH: list[Any] = [True, False, None, "yes", "", 1, 0, []]
BIASES: list[Any] = ["none", "all", "lora_only", "some_only", "some", "", None, True]
