"""Patterns from a file have one allowance of time for all modules together, and plain names cost nothing."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import PeftRefError, TargetError
from peft_ref.files.config import AdapterConfig, from_dict
from peft_ref.graph import MappingGraph, Targets, match
from peft_ref.graph.pattern_keys import Keys
from peft_ref.graph.patterns import Matcher
from peft_ref.graph.targets import unused_patterns
from peft_ref.model import adapt, add
from tests.hostile.corpus_folders import ENDLESS, RIGHT

MODULES = 10_000
NAMES = tuple(f"model.layers.{i // 7}.self_attn.{x}_proj" for i, x in zip(range(MODULES), itertools.cycle("qkvogud"), strict=False))
GRAPH = MappingGraph(arrays=dict.fromkeys((f"{name}.weight" for name in NAMES), np.zeros((1, 1))))
SECONDS = 10  # of processor time, where 0.5 + 10,000 times 1e-4 are allowed to the patterns; the rest is reading and a slow machine
# Each takes long on every name, and is decided on it: none alone is over time.
SLOW = r"(?:\w|[a-z._0-9]|.){13}[!?]|.*q_proj"

FIELDS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")


def refused_in_time(config: dict[str, Any], named: str) -> None:
    began = time.process_time()
    with pytest.raises(PeftRefError) as caught:
        add(adapt(GRAPH), "default", from_dict(config), np.random.default_rng(0))
    assert time.process_time() - began < SECONDS
    assert named[:40] in str(caught.value).replace("\\\\", "\\")


@pytest.mark.parametrize(
    ("field", "pattern"), [*((field, ENDLESS) for field in FIELDS), *((field, SLOW) for field in ("target_modules", "rank_pattern"))]
)
def test_a_slow_pattern_is_stopped_over_ten_thousand_modules_in_all(field: str, pattern: str) -> None:
    value: Any = [pattern] if field in ("modules_to_save", "layers_pattern") else pattern
    value = {pattern: 4} if field in ("rank_pattern", "alpha_pattern") else value
    config = {**RIGHT, "target_modules": ["q_proj", "k_proj", "v_proj"], field: value}
    if field == "layers_pattern":
        config["layers_to_transform"] = list(range(9999))
    refused_in_time(config, pattern)


@pytest.mark.parametrize("kind", ["IA3", "OSF"])
def test_the_patterns_that_one_method_alone_has_are_stopped_too(kind: str) -> None:
    base = {"peft_type": kind, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    own = {"feedforward_modules": ENDLESS} if kind == "IA3" else {"effective_rank": 1, "rank_pattern": {ENDLESS: 1}}
    refused_in_time({**base, **own}, ENDLESS)


def test_a_thousand_patterns_that_are_quick_alone_are_stopped_together() -> None:
    refused_in_time({**RIGHT, "rank_pattern": {f"[a-z]+{i}": 2 for i in range(1000)}}, "[a-z]+")


def test_a_rank_for_each_of_ten_thousand_modules_by_its_name_is_quick() -> None:
    config: AdapterConfig = from_dict({**RIGHT, "rank_pattern": {name: 1 + i % 50 for i, name in enumerate(NAMES)}})
    began = time.process_time()
    ranks = [config.method_for(name).r for name in NAMES]  # type: ignore[attr-defined]
    assert time.process_time() - began < SECONDS
    assert ranks == [1 + i % 50 for i in range(MODULES)]
    assert unused_patterns((*NAMES, "nowhere"), NAMES) == ("nowhere",)


def test_twenty_thousand_targets_that_match_nothing_are_said_in_time() -> None:
    began = time.process_time()
    with pytest.raises(TargetError, match="matches none"):
        match(Targets(target_modules=tuple(f"{'a' * 900}.m{i}" for i in range(20_000))), GRAPH)
    assert time.process_time() - began < SECONDS


def test_keys_that_are_looked_up_are_those_that_re_finds() -> None:
    """Over random keys, plain and not, and random names: PEFT's two expressions, asked of Python's `re`."""
    rng, found = random.Random(3), 0
    letters = ["a", "b", ".", "_", "1"]
    for _ in range(3000):
        keys = tuple(
            {"".join(rng.choice(letters) for _ in range(rng.randint(1, 4))) for _ in range(4)} | {rng.choice(["a+", "b|a", "(a)"])}
        )
        name = "".join(rng.choice([*letters, "."]) for _ in range(rng.randint(1, 7)))
        for below, form in ((False, r"(.*\.)?({})$"), (True, r".*\.{}$")):
            matching = [key for key in keys if re.match(form.format(key), name)]
            expected = matching[0] if matching else name if name in keys else None
            assert Keys(keys, below=below).first(name, Matcher()) == expected, (keys, name, below)
            assert Keys(keys, below=below).all(name, Matcher()) == set(matching)
            found += expected is not None
    assert found > 1000


def test_the_error_of_a_pattern_in_a_folder_names_the_folder(tmp_path: Any) -> None:
    from peft_ref.model import load
    from tests.hostile.corpus import CONFIG, adapter

    adapter(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({**RIGHT, "target_modules": ENDLESS}))
    with pytest.raises(TargetError, match=r"backtracks") as caught:
        load(adapt(GRAPH), tmp_path)
    assert str(tmp_path) in str(caught.value)
