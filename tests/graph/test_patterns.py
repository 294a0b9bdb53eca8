"""Patterns mean what they mean to Python's `re`, and stop in time."""

from __future__ import annotations

import random
import re
import time
import warnings
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import TargetError
from peft_ref.graph import MappingGraph, Targets, match
from peft_ref.graph.patterns import Matcher, pattern_key
from peft_ref.graph.targets import from_pattern, is_feedforward, unused_patterns

PIECES = [
    *["a", "b", "q_proj", ".", r"\.", r"\d", r"\w+", ".*", "(a|b)", "(?:a)", "(?P<n>b)", "[ab]", "[^a]", "[]a]", "[[:alpha:]]", "[a-z_]"],
    *["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "{,}", "{e<=1}", "{", "}", "{a", "+?", "++", "*+", "$", "^", r"\Z", "|", r"\b"],
    *[
        "(?!x)",
        "(?<=a)",
        "(?<!x)",
        r"\\",
        r"\{",
        "(?(1)a|b)",
        "[&&a]",
        "[a--b]",
        "[a||b]",
        r"[\]a]",
        r"[\d.]",
        "(?i:A)",
        r"\x61",
        "(",
        ")",
        "]",
    ],
]
NAMES = [
    "a",
    "b",
    "ab",
    "aab",
    "q_proj",
    "a.q_proj",
    "a1",
    "a{",
    "a{e<=1}",
    "l]",
    "",
    "layers.1.q_proj",
    "a{a",
    "&",
    "-",
    "|",
    "[",
    "x",
    "{2}",
]


def test_a_pattern_matches_what_re_matches() -> None:
    rng, tried, valid = random.Random(0), 0, 0
    while tried < 4000:
        pattern = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 5)))
        tried += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `re` warns of what may become a nested set
            try:
                compiled = re.compile(pattern)
            except re.error:
                with pytest.raises(TargetError, match="no regular expression"):
                    Matcher().full(pattern, "a")
                continue
            valid += 1
            for name in NAMES:
                assert Matcher().full(pattern, name) == bool(compiled.fullmatch(name)), (pattern, name)
                expression = rf"(?:^|.*?\.){pattern}"
                assert bool(Matcher().start(expression, name, pattern)) == bool(re.match(expression, name)), (pattern, name)
    assert valid > 1000


@pytest.mark.parametrize("pattern", [r"model\.(a|a)*\.q_proj", r"model\.(a|aa)+\.q_proj"])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save"])
def test_a_pattern_that_backtracks_for_ever_is_stopped_and_named(pattern: str, field: str) -> None:
    graph = MappingGraph(arrays={f"model.{'a' * 60}.{i}.x.0.q_proj.0.0.weight": np.zeros((2, 2)) for i in range(50)})
    given: dict[str, Any] = {"target_modules": ("q_proj.0.0",), field: pattern if field != "modules_to_save" else (pattern,)}
    if field == "layers_pattern":
        given["layers_to_transform"] = (0,)
    began = time.process_time()
    with pytest.raises(TargetError) as caught:
        match(Targets(**given), graph)
    assert time.process_time() - began < 2
    assert repr(pattern) in str(caught.value)
    assert "backtracks" in str(caught.value)


def test_a_pattern_that_only_looks_dangerous_is_decided() -> None:
    assert not Matcher().full(r"(a+)+$", "a" * 5000 + "!")


@pytest.mark.parametrize(
    "pattern", ["(((a{1000}){1000}){1000}){1000}", "a{2000000}", "(?:ab{3000}c{3000}){9}", "[ab]{50000}", r"\w{9999}{9999}"]
)
def test_a_pattern_that_would_fill_the_memory_is_refused(pattern: str) -> None:
    with pytest.raises(TargetError):
        Matcher().full(pattern, "a")


def test_a_long_list_of_hard_names_shares_one_allowance() -> None:
    graph = MappingGraph(arrays={f"{'a' * n}.x.b.weight": np.zeros((2, 2)) for n in range(12, 60)})
    began = time.process_time()
    with pytest.raises(TargetError):
        match(Targets(target_modules=r"(a|a)*\.b"), graph)
    assert time.process_time() - began < 2


def test_the_first_key_that_ends_a_name_gives_its_rank() -> None:
    ranks = {"q_proj": 4, r"layers\.1\..*": 8, "k|v": 2}
    assert from_pattern(ranks, "model.layers.1.q_proj", 1) == 4
    assert from_pattern(ranks, "model.layers.1.k_proj", 1) == 8
    assert from_pattern(ranks, "model.v", 1) == 2
    assert from_pattern(ranks, "model.xq_proj", 1) == 1
    assert pattern_key(["(x", "y"][1:], "model.y") == "y"
    assert unused_patterns(ranks, ["a.q_proj", "k"]) == (r"layers\.1\..*",)


def test_a_name_with_signs_of_a_regex_is_still_its_own_key() -> None:
    assert from_pattern({"a+b": 3}, "a+b", 1) == 3


def test_feedforward_modules_match_any_end_of_a_name() -> None:
    assert is_feedforward(["c_proj"], "h.0.xc_proj")
    assert not is_feedforward(["c_proj"], "h.0.c_proj.x")
    assert is_feedforward(r".*\.c_proj", "h.0.c_proj")
    assert not is_feedforward(r".*\.c_proj", "h.0.xc_proj")
