"""The known ways to be wrong about names, keys and configurations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeAlias

from peft_ref.methods import METHODS
from peft_ref.registry.complete import keys_of

Question: TypeAlias = Mapping[str, Any]


def _as_if(**changes: Any) -> Callable[[Question], set[str]]:
    """The modules that another configuration targets."""

    def wrong(question: Question) -> set[str]:
        from peft_ref.check.target_graph import matched_names
        from peft_ref.errors import TargetError

        try:
            return set(matched_names(question["modules"], {**question["config"], **changes}, question["model"]))
        except TargetError:
            return set()

    return wrong


def _suffix_without_dot(question: Question) -> set[str]:
    targets = question["config"].get("target_modules")
    if not isinstance(targets, list):
        return set()
    return {m["name"] for m in question["modules"] if m["name"].endswith(tuple(targets))}


def _searched(question: Question) -> set[str]:
    pattern = question["config"].get("target_modules")
    if not isinstance(pattern, str) or pattern == "all-linear":
        return set()
    return {m["name"] for m in question["modules"] if re.search(pattern, m["name"])}


def _every_linear(question: Question) -> set[str]:
    if question["config"].get("target_modules") != "all-linear":
        return set()
    return {m["name"] for m in question["modules"] if m["kind"] in ("linear", "transposed_linear")}


TARGET_MISTAKES: dict[str, tuple[str, Callable[[Question], set[str]]]] = {
    "suffix-without-dot": ("a name in target_modules matches any ending, not only a whole last part", _suffix_without_dot),
    "regex-searched": ("a regex must match the whole name, not a part of it", _searched),
    "output-head-adapted": ("all-linear leaves the output head out", _every_linear),
    "exclude-ignored": ("exclude_modules is not read", _as_if(exclude_modules=None)),
    "layers-ignored": ("layers_to_transform is not read", _as_if(layers_to_transform=None, layers_pattern=None)),
}


def _numerator(peft_type: str) -> tuple[str, Any]:
    """What the numerator of the scale is called, and its default; nothing where there is no scale."""
    fields = {f.name: f.default for cls in METHODS.siblings(peft_type) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # as every method
    return next(((name, fields[name]) for name in ("lora_alpha", "alpha") if name in fields), ("", None))


def config_mistakes(question: Question) -> dict[str, tuple[str, Question]]:
    """For a question about a configuration, the questions that a port may have answered instead."""
    config = dict(question["adapter_config"])

    def asked(**changes: Any) -> Question:
        return {**question, "adapter_config": {**config, **changes}}

    alpha, default = _numerator(str(config.get("peft_type")))
    mistakes: dict[str, tuple[str, Question]] = {}
    if config.get("rank_pattern"):
        mistakes["rank-pattern-ignored"] = ("rank_pattern is not read", asked(rank_pattern={}))
    if config.get("alpha_pattern"):
        mistakes["per-layer-alpha-lost"] = ("alpha_pattern is not read", asked(alpha_pattern={}))
        mistakes["patterns-ignored"] = ("rank_pattern and alpha_pattern are not read", asked(rank_pattern={}, alpha_pattern={}))
    if config.get("lambda_pattern"):
        mistakes["lambda-pattern-ignored"] = ("lambda_pattern is not read", asked(lambda_pattern={}))
    rank = config.get("r", config.get("init_r"))
    if alpha and alpha not in config and rank is not None:
        for value, text in ((0, "0"), (1, "1"), (rank, "r"), (16, "16"), (32, "32")):
            mistakes[f"missing-alpha-default-{text}"] = (
                f"a missing {alpha} is taken for {text}; its default is {default}",
                asked(**{alpha: value}),
            )
    for size in ("block_size", "n_frequency"):
        if config.get(f"{size}_pattern"):
            mistakes["size-pattern-ignored"] = (f"{size}_pattern is not read", asked(**{f"{size}_pattern": {}}))
    if config.get("use_rslora"):
        mistakes["rslora-ignored"] = ("use_rslora is not read", asked(use_rslora=False))
    if config.get("feedforward_modules"):
        mistakes["feedforward-ignored"] = ("feedforward_modules is not read", asked(feedforward_modules=[]))
    return mistakes


@cache
def _own_words() -> str:
    """The first words of all methods' keys, as alternatives: after them PEFT keeps the adapter's name in memory."""
    return "|".join(sorted({re.escape(key.partition(".")[0]) for cls in METHODS.values() for key in keys_of(cls)}))


KEY_MISTAKES: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "key-prefix-missing": ("the keys lack the prefix base_model.model.", lambda key, name: key.removeprefix("base_model.model.")),
    "key-prefix-short": (
        "the keys begin with base_model. instead of base_model.model.",
        lambda key, name: "base_model." + key.removeprefix("base_model.model."),
    ),
    "adapter-name-in-key": (
        "the adapter's name stays in the keys; a saved file has none",
        lambda key, name: re.sub(rf"\.({_own_words()})(?=\.|$)", rf".\1.{name}", key, count=1),
    ),
    "weight-suffix-missing": ("the keys lack the ending .weight", lambda key, name: key.removesuffix(".weight")),
    "weight-suffix-added": ("bare parameters have no ending .weight", lambda key, name: key.removesuffix(".weight") + ".weight"),
    "peft-numeric-name": (
        "modules whose path holds the adapter's name are lost: PEFT filters by substring",
        lambda key, name: "" if f".{name}." in key else key,
    ),
}
