"""Which modules an adapter goes to: the words of adapter_config.json, matched as HF PEFT 0.21.2 matches them.

target_modules        a list: names, or ends of names from a dot on.   text: a regex of the whole name.   "all-linear": every linear
                      layer but the head.   None: the method's default for the architecture (`defaults.py`)
exclude_modules       a list or a regex, read the same way; wins over target_modules
layers_to_transform   of the modules matched by the end of their name, those in a layer of this number. A full name is not asked
layers_pattern        what stands before the number (a regex); without it the first number that has two parts of a name before it
modules_to_save       trained in full beside the adapter: every module whose name ends so, dot or not. As a regex, each keeps the
                      adapter away from a module of that name and from all inside it
target_parameters     single parameters by the end of their name, such as fused experts

Patterns come from files, so they are stopped when they take too long. What PEFT raises for is a `TargetError`, `ConfigError` or
`UnsupportedLayerError` here; what it warns of is a note in the answer. Two things of PEFT's are not followed: `modules_to_save` that would
end up on a part of the adapter itself ("dropout" is the end of "lora_dropout"), and the rewriting of targets for the mixtures (mixtral,
qwen2_moe) whose experts transformers 5 fuses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar, final

from peft_ref.contracts import EVERY_KIND
from peft_ref.errors import ConfigError, TargetError, UnsupportedLayerError
from peft_ref.graph.beside import chosen_parameters, saved_modules
from peft_ref.graph.decide import TARGET
from peft_ref.graph.defaults import ALONE_REFUSED, PATTERN_WITH_REGEX_REFUSED, TRANSFORM_WITH_REGEX_REFUSED
from peft_ref.graph.explaining import notes_on, nothing_matched
from peft_ref.graph.pattern_keys import Keys
from peft_ref.graph.patterns import SECONDS, SECONDS_PER_NAME, Matcher, pattern_key
from peft_ref.graph.protocol import Graph, Module
from peft_ref.graph.rules import rules_for

DUMMY = "dummy-target-modules"  # PEFT's name for an adapter that goes nowhere

V = TypeVar("V")


@final
@dataclass(frozen=True, kw_only=True)
class Targets:
    """Where an adapter goes, in the words of adapter_config.json."""

    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list | set | frozenset):  # as JSON has it; a set has no order of its own
                value = tuple(value if isinstance(value, list) else sorted(value, key=str))
                object.__setattr__(self, f.name, value)
            item = int if f.name == "layers_to_transform" else str
            alone = isinstance(value, item) and f.name not in ("modules_to_save", "target_parameters")
            if value is not None and not alone and not (isinstance(value, tuple) and all(isinstance(v, item) for v in value)):
                raise ConfigError(f"{f.name}={value!r:.80} is not understood, expected {f.type}.\n  Put a single name into a list.")


class Matched(NamedTuple):
    """The answer, in the model's order."""

    modules: tuple[str, ...]  # get an adapter
    saved: tuple[str, ...]  # are trained and saved in full
    parameters: tuple[str, ...]  # get an adapter of their own
    notes: tuple[str, ...]  # what does not stop anything and may not be meant


def match(
    targets: Targets, graph: Graph, *, peft_type: str = "LORA", task_type: str | None = None, kinds: Collection[str] | None = None
) -> Matched:
    """Where `targets` sends an adapter of `peft_type` in `graph`.

    With `kinds`, those the method works on, a match of any other is an `UnsupportedLayerError`, as it is in PEFT.
    """
    check(targets, peft_type)
    modules = graph.modules()
    rules = rules_for(targets, graph, peft_type, task_type)
    verdicts = {} if targets.target_modules == DUMMY else {name: rules.decide(name) for name in modules}
    chosen = tuple(name for name, verdict in verdicts.items() if verdict.outcome == TARGET)
    for name in chosen:
        _check_module(modules[name], graph, peft_type, kinds)
    parameters = chosen_parameters(targets, graph, chosen)
    adapted = {*chosen, *(name.rpartition(".")[0] for name in parameters)}
    if not adapted and targets.target_modules != DUMMY:
        raise TargetError(nothing_matched(targets, rules, graph, verdicts))
    return Matched(
        chosen, saved_modules(targets, graph, task_type, adapted), parameters, tuple(notes_on(targets, rules, graph, verdicts, parameters))
    )


def explain(targets: Targets, graph: Graph, *, peft_type: str = "LORA", task_type: str | None = None) -> dict[str, str]:
    """For every module, why it gets an adapter or why not. Does not raise when nothing matches."""
    check(targets, peft_type)
    rules = rules_for(targets, graph, peft_type, task_type)
    return {name: rules.decide(name).reason for name in graph.modules()}


def check(targets: Targets, peft_type: str) -> None:
    """Raise `ConfigError` for the combinations that PEFT's configuration of this method refuses."""
    regex = isinstance(targets.target_modules, str)
    for refused, given, what in (
        (TRANSFORM_WITH_REGEX_REFUSED, targets.layers_to_transform is not None, "layers_to_transform"),
        (PATTERN_WITH_REGEX_REFUSED, targets.layers_pattern is not None, "layers_pattern"),
    ):
        if regex and given and peft_type in refused:
            raise ConfigError(
                f"{peft_type}: {what} with target_modules={targets.target_modules!r:.60}, a regex (HF PEFT refuses it too).\n"
                "  Say it in the regex, or list the module names."
            )
    if targets.layers_pattern and targets.layers_to_transform is None and peft_type in ALONE_REFUSED:
        raise ConfigError(
            f"{peft_type}: layers_pattern without layers_to_transform (HF PEFT refuses it too).\n  Give the layers' numbers too."
        )


def is_feedforward(feedforward_modules: str | Collection[str], name: str, clock: Matcher | None = None) -> bool:
    """Whether IA3 scales the input of `name` and not its output. A list matches ends of names, dot or not: "c_proj" is also "xc_proj"."""
    if isinstance(feedforward_modules, str):
        return (clock or Matcher()).full(feedforward_modules, name)
    return any(name.endswith(end) for end in feedforward_modules)


def from_pattern(patterns: Mapping[str, V], name: str, default: V) -> V:
    """The value that rank_pattern or alpha_pattern gives to the module `name`: that of the first key that matches."""
    key = pattern_key(tuple(patterns), name)
    return default if key is None else patterns[key]


def unused_patterns(patterns: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """The keys of a rank_pattern or alpha_pattern that match none of `names`; PEFT warns of them."""
    keys, clock = Keys(patterns), Matcher(SECONDS + SECONDS_PER_NAME * len(names))
    used = {key for name in names for key in keys.all(name, clock)}
    return tuple(key for key in patterns if key not in used)


def _check_module(module: Module, graph: Graph, peft_type: str, kinds: Collection[str] | None) -> None:
    if kinds is not None and module.kind not in kinds:
        what = module.class_name or module.kind
        in_peft = "HF PEFT refuses it too" if kinds != EVERY_KIND else "HF PEFT copies whatever it is with all that is in it"
        raise UnsupportedLayerError(
            f"{peft_type} at {module.name!r}: a module of kind {module.kind!r} ({what}) is not supported ({in_peft}).\n"
            f"  Supported: {', '.join(sorted(kinds))}. Narrow target_modules, or exclude this one."
        )
    mamba = graph.model_type in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
    if mamba and peft_type in ("LORA", "ADALORA", "XLORA", "RANDLORA") and module.name.rpartition(".")[2] in ("out_proj", "conv1d"):
        raise TargetError(
            f"{peft_type} at {module.name!r}: out_proj and conv1d of a {graph.model_type} are read by its own kernel,\n"
            "  which knows of no adapter (HF PEFT refuses it too). Take them out of target_modules."
        )
