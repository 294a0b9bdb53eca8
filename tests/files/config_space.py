"""Random adapter configurations for a small model, right and wrong: what PEFT and we are both asked about.

A configuration starts from one that is right, and up to three of its words are changed to values that some version of somebody might write:
other kinds of value, values out of range, words that contradict each other, names that match nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_ref.methods import METHODS
from tests.methods import facts
from tests.methods.facts import Difference

OWN = {name: facts(name) for name in METHODS.weights if facts(name).config}
STARTS: dict[str, Mapping[str, Any]] = {own.config["peft_type"]: own.config for own in OWN.values()}
SPACE: dict[str, Mapping[str, list[Any]]] = {own.config["peft_type"]: own.space for own in OWN.values()}
MADE = {own.config["peft_type"]: own.made for own in OWN.values()}
UNASKED = (
    *(("FOURIERFT", word, "8") for word in ("n_frequency", "random_loc_seed")),
    ("SHIRA", "random_seed", "7"),
)
OFTEN = ("LORA",) * 2  # beside its turn, for it has the most words


def random_config(rng: np.random.Generator) -> dict[str, Any]:
    kind = str(rng.choice([*OFTEN, *STARTS]))
    space = SPACE[kind]
    words = list(space)
    data = dict(STARTS[kind])
    for i in rng.permutation(len(words))[: rng.integers(0, 4)]:
        values = space[words[i]]
        data[words[i]] = values[rng.integers(len(values))]
    return data


def every_single_change(kind: str) -> list[dict[str, Any]]:
    """Each value of each word alone, so that none is left to chance."""
    return [{**STARTS[kind], word: value} for word, values in SPACE[kind].items() for value in values]


def looked_at_by_none() -> list[dict[str, Any]]:
    """Wrong values that no module of the model asks for."""
    nowhere = {**STARTS["LORA"], "target_modules": "dummy-target-modules"}
    values: dict[str, Any] = {"r": 0, "lora_alpha": "8", "lora_dropout": None, "init_lora_weights": "magic", "rank_pattern": ["q"]}
    odd = {**nowhere, "r": 3, "init_lora_weights": "orthogonal"}
    full = {**STARTS["LORA"], "target_modules": ["layers.0.q"], "layers_to_transform": ["0"]}
    others = [{**STARTS[kind], "target_modules": "dummy-target-modules", word: value} for kind, word, value in UNASKED]
    return [*({**nowhere, word: value} for word, value in values.items()), *others, odd, full]


def explained(differences: tuple[Difference, ...], data: dict[str, Any], peft_says: Any, we_say: Any) -> Difference:
    """The row that says why one refuses and the other does not."""
    who, refusal = ("we", we_say) if isinstance(we_say, str) else ("PEFT", peft_says)
    rows = [d for d in differences if d.who == who and re.search(d.message, refusal)]
    assert rows, f"{data}\n  PEFT: {peft_says}\n  we:   {we_say}"
    return rows[0]
