"""What multiplies an adapter's change of one module, and which words of adapter_config.json it comes from.

    lora_alpha / r = 16 / 8               the plain rule
    lora_alpha / sqrt(r) = 16 / sqrt(8)   with use_rslora
    ... r from rank_pattern 'q_proj'      where a pattern has the word

Nothing is known here about single methods: the rule is the one that gives the method's own scale, for its hyper-parameters and for others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import permutations
from typing import Any, NamedTuple

from peft_ref.contracts import WeightMethod
from peft_ref.errors import PeftRefError
from peft_ref.files.config import ALPHAS, RANKS, AdapterConfig
from peft_ref.files.rules import field_names
from peft_ref.layers import Layer

RANK_WORDS = ("r", "init_r", "effective_rank", "hybrid_r")
KNOWN = "its own rule"


class Scale(NamedTuple):
    value: float
    rule: str  # in the words of the configuration
    numbers: str  # the same with their numbers
    patterns: Mapping[str, str]  # the words that a pattern decided, each with the pattern's name and key

    def said(self) -> str:
        spelled = self.rule if self.numbers == self.rule else f"{self.rule} = {self.numbers}"
        return ", ".join([spelled, *(f"{word} from {where}" for word, where in self.patterns.items())])


# How a scale is worked out from an alpha and what follows it.
RULES: Mapping[str, Callable[..., float]] = {
    "{} / {}": lambda alpha, r: alpha / r,
    "{} / sqrt({})": lambda alpha, r: alpha / math.sqrt(r),
    "{} / ({} + 1e-5)": lambda alpha, r: alpha / (r + 1e-5),
    "{} / ({} + {})": lambda alpha, r, more: alpha / (r + more),
    "{}": float,
}


class _Rule(NamedTuple):
    spelled: str  # one of RULES
    words: tuple[str, ...]  # of the configuration, in its places

    def value(self, method: WeightMethod[Any]) -> float:
        return RULES[self.spelled](*(getattr(method, word) for word in self.words))


def rank_of(method: WeightMethod[Any]) -> int | None:
    """The rank that the method has by its hyper-parameters; None where it has none."""
    return next((int(rank) for name in RANKS if (rank := getattr(method, name, None))), None)


def scale_of(config: AdapterConfig, module: str, layer: Layer | None) -> Scale | None:
    """The scale of the adapter on one module; None where the method has none that a configuration says."""
    method = config.method_for(module)
    if (value := _value(method, layer)) is None:
        return None
    rule = _rule_of(method, layer)
    patterns = {word: where for word, where in patterns_of(config, module).items() if rule is None or word in rule.words}
    if rule is None:
        return Scale(value, KNOWN, KNOWN, patterns)
    numbers = (f"{getattr(method, word):.6g}" for word in rule.words)
    return Scale(value, rule.spelled.format(*rule.words), rule.spelled.format(*numbers), patterns)


def patterns_of(config: AdapterConfig, module: str) -> dict[str, str]:
    """The words of the method that a pattern decides on this module: {"r": "rank_pattern 'q_proj'"}."""
    names, found = field_names(type(config.method)), {}
    for name, words in (("rank_pattern", RANKS), ("alpha_pattern", ALPHAS)):
        if (key := config.pattern_key(name, module)) is not None and (word := next((w for w in words if w in names), None)) is not None:
            found[word] = f"{name} {key!r}"
    return found


@lru_cache(maxsize=4096)  # most modules are alike
def _rule_of(method: WeightMethod[Any], layer: Layer | None) -> _Rule | None:
    return next((rule for rule in _rules(method) if _holds(rule, method, layer)), None)


def _value(method: WeightMethod[Any], layer: Layer | None) -> float | None:
    scale: Any = getattr(method, "scale", getattr(method, "scaling", None))
    if callable(scale):  # it depends on the rank that the layer leaves
        scale = None if layer is None else scale(method.dims(layer)["r"])
    return None if scale is None else float(scale)


def _rules(method: WeightMethod[Any]) -> Iterator[_Rule]:
    """Every rule that the method's words can spell."""
    names = field_names(type(method))
    ranks = [word for word in RANK_WORDS if word in names]
    for alpha in (name for name in names if name.endswith("alpha")):
        for spelled in RULES:
            yield from (_Rule(spelled, (alpha, *words)) for words in permutations(ranks, spelled.count("{}") - 1))
    if "scaling" in names:
        yield _Rule("{}", ("scaling",))


def _holds(rule: _Rule, method: WeightMethod[Any], layer: Layer | None) -> bool:
    """Whether the rule gives the method's scale, as it is and with each of its words and of the ranks changed."""
    tried, names = 0, field_names(type(method))
    for word in (None, *rule.words, *(word for word in RANK_WORDS if word in names and word not in rule.words)):
        try:
            other: Any = method if word is None else dataclasses.replace(method, **{word: 3 * getattr(method, word) + 1})  # type: ignore[type-var]
            wanted, got = _value(other, layer), rule.value(other)
        except (PeftRefError, ZeroDivisionError, ValueError, TypeError):  # no such method, or a word that is left out
            continue
        if wanted is None or not (math.isclose(wanted, got, rel_tol=1e-12) or (math.isnan(wanted) and math.isnan(got))):
            return False
        tried += 1
    return tried > 1
