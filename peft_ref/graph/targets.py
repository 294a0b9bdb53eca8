"""Which modules an adapter goes to: HF PEFT's `target_modules` and what stands beside it, matched as PEFT 0.21.2 does.

    target_modules        a list: names, or ends of names from a dot on.   text: a regex of the whole name.   "all-linear": every linear
                          layer but the head.   None: the method's default for the architecture (`defaults.py`)
    exclude_modules       a list or a regex, read the same way; wins over target_modules
    layers_to_transform   of the modules matched by the end of their name, those in a layer of this number. A full name is not asked
    layers_pattern        what stands before the number (a regex); without it the first number that has two parts of a name before it
    modules_to_save       trained in full beside the adapter: every module whose name ends so, dot or not. As a regex, each keeps the adapter
                          away from a module of that name and from all inside it
    target_parameters     single parameters by the end of their name, such as fused experts

Patterns come from files, so they are stopped when they take too long. What PEFT raises for is a `TargetError`, `ConfigError` or
`UnsupportedLayerError` here; what it warns of is a note in the answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar, final

from peft_ref.errors import ConfigError, TargetError, UnsupportedLayerError
from peft_ref.graph.decide import EXCLUDED, SAVED, TARGET, Rules, Verdict, suffixes
from peft_ref.graph.defaults import ALONE_REFUSED, DEFAULT_TARGETS, FEEDFORWARD, PATTERN_WITH_REGEX_REFUSED, TRANSFORM_WITH_REGEX_REFUSED
from peft_ref.graph.explaining import nearest, unmatched
from peft_ref.graph.patterns import Matcher, pattern_key
from peft_ref.graph.protocol import Graph, Module

DUMMY = "dummy-target-modules"  # PEFT's name for an adapter that goes nowhere
ALL_LINEAR = "all-linear"
SEQ_CLS_HEADS = ("score", "classifier")
# What a task adds to modules_to_save. Only for SEQ_CLS does PEFT add it before it matches, so only there it keeps the adapter away.
SAVED_BY_TASK = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
NOT_SAVED = ("ModuleDict", "ModuleList", "ParameterDict", "ParameterList")
MANY = 20  # from so many target modules on, PEFT condenses the list

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
                value = tuple(value if isinstance(value, list) else sorted(value))
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
    rules = _rules(targets, graph, peft_type, task_type)
    verdicts = {} if targets.target_modules == DUMMY else {name: rules.decide(name) for name in modules}
    chosen = tuple(name for name, verdict in verdicts.items() if verdict.outcome == TARGET)
    for name in chosen:
        _check_module(modules[name], graph, peft_type, kinds)
    parameters = _parameters(targets, graph, chosen)
    if not chosen and not parameters and targets.target_modules != DUMMY:
        raise TargetError(_nothing(targets, rules, graph, verdicts))
    return Matched(
        chosen, _saved(targets, graph, task_type, chosen), parameters, tuple(_notes(targets, rules, graph, verdicts, parameters))
    )


def explain(targets: Targets, graph: Graph, *, peft_type: str = "LORA", task_type: str | None = None) -> dict[str, str]:
    """For every module, why it gets an adapter or why not. Does not raise when nothing matches."""
    check(targets, peft_type)
    rules = _rules(targets, graph, peft_type, task_type)
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


def default_targets(graph: Graph, peft_type: str) -> str | tuple[str, ...] | None:
    """PEFT's target_modules for this method and architecture; None where it has none."""
    return DEFAULT_TARGETS.get(peft_type, {}).get(graph.model_type)


def default_feedforward(graph: Graph) -> tuple[str, ...]:
    """PEFT's feedforward_modules of IA3 for this architecture."""
    if graph.model_type not in FEEDFORWARD:
        raise TargetError(f"IA3 has no default feedforward_modules for model_type {graph.model_type!r}.\n  Give feedforward_modules.")
    return FEEDFORWARD[graph.model_type]


def is_feedforward(feedforward_modules: str | Collection[str], name: str) -> bool:
    """Whether IA3 scales the input of `name` and not its output. A list matches ends of names, dot or not: "c_proj" is also "xc_proj"."""
    if isinstance(feedforward_modules, str):
        return Matcher().full(feedforward_modules, name)
    return any(name.endswith(end) for end in feedforward_modules)


def from_pattern(patterns: Mapping[str, V], name: str, default: V) -> V:
    """The value that rank_pattern or alpha_pattern gives to the module `name`: that of the first key that matches."""
    key = pattern_key(tuple(patterns), name)
    return default if key is None else patterns[key]


def unused_patterns(patterns: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """The keys of a rank_pattern or alpha_pattern that match none of `names`; PEFT warns of them."""
    clock = Matcher()
    return tuple(p for p in patterns if not any(clock.start(rf"(.*\.)?({p})$", name, p) for name in names))


def _rules(targets: Targets, graph: Graph, peft_type: str, task_type: str | None) -> Rules:
    """`targets` with the defaults and "all-linear" written out."""
    chosen = targets.target_modules
    if chosen is None:
        chosen = default_targets(graph, peft_type)
        if chosen is None and peft_type == "OSF":
            chosen = ALL_LINEAR
        if chosen is None and not (targets.target_parameters and peft_type in ("LORA", "ADALORA")):
            raise TargetError(
                f"{peft_type} has no default target_modules for model_type {graph.model_type!r}.\n  Give target_modules, for example 'all-linear'."
            )
    if isinstance(chosen, str) and chosen.lower() == ALL_LINEAR:
        chosen = _all_linear(graph, task_type)
    if isinstance(chosen, tuple) and len(chosen) >= MANY and peft_type != "IA3":
        chosen = _condensed(chosen, list(graph.modules()))
    guards = (*(targets.modules_to_save or ()), *(SAVED_BY_TASK["SEQ_CLS"] if task_type == "SEQ_CLS" else ()))
    transform, patterns = targets.layers_to_transform, targets.layers_pattern
    return Rules(
        target=chosen,
        exclude=targets.exclude_modules or (),
        guards=guards,
        layers=(transform,) if isinstance(transform, int) else transform or (),
        layer_patterns=(patterns,) if isinstance(patterns, str) and patterns else tuple(patterns or ()),
        matcher=Matcher(1.0 + 1e-4 * len(graph.modules())),  # a model of many modules may take its time
    )


def _all_linear(graph: Graph, task_type: str | None) -> tuple[str, ...]:
    modules = graph.modules()
    head = graph.output_head
    if head is None and graph.pretrained and task_type == "SEQ_CLS":
        head = next((name for name in SEQ_CLS_HEADS if name in modules), None)
    return tuple(name for name, m in modules.items() if m.kind in ("linear", "transposed_linear") and name != head)


def _condensed(targets: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
    """Fewer ends of names that match the same modules.

    PEFT does this to be quicker. It shows: a full name that was condensed is matched by its end, and then layers_to_transform counts.
    """
    if "" in targets:
        raise TargetError("target_modules holds an empty name (HF PEFT refuses it too).\n  Take it out.")
    wanted = set(targets)
    others = [name for name in names if wanted.isdisjoint((name, *suffixes(name)))]
    taken = {end for name in others for end in (name, *suffixes(name))}
    short: list[str] = []
    for ends in sorted([*reversed(list(suffixes(name))), name] for name in wanted):
        for end in ends:
            if end not in short and end not in taken and not any(ends[-1].endswith(f".{s}") for s in short):
                short.append(end)
                break
    return tuple(short) if short and len(short) < len(wanted) else targets


def _check_module(module: Module, graph: Graph, peft_type: str, kinds: Collection[str] | None) -> None:
    if kinds is not None and module.kind not in kinds:
        what = module.class_name or module.kind
        raise UnsupportedLayerError(
            f"{peft_type} at {module.name!r}: a module of kind {module.kind!r} ({what}) is not supported (HF PEFT refuses it too).\n"
            f"  Supported: {', '.join(sorted(kinds))}. Narrow target_modules, or exclude this one."
        )
    mamba = graph.model_type in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
    if mamba and peft_type in ("LORA", "ADALORA", "XLORA", "RANDLORA") and module.name.rpartition(".")[2] in ("out_proj", "conv1d"):
        raise TargetError(
            f"{peft_type} at {module.name!r}: out_proj and conv1d of a {graph.model_type} are read by its own kernel,\n"
            "  which knows of no adapter (HF PEFT refuses it too). Take them out of target_modules."
        )


def _parameters(targets: Targets, graph: Graph, chosen: Collection[str]) -> tuple[str, ...]:
    wanted = set(targets.target_parameters or ())
    if not wanted:
        return ()
    found = []
    order = {"": -1} | {name: place for place, name in enumerate(graph.modules())}
    shapes = {name: p.shape for name, p in graph.parameters().items()}
    for name in (*shapes, *graph.tied()):
        holder = name.rpartition(".")[0]
        if holder not in order or wanted.isdisjoint((name, *suffixes(name))):
            continue
        axes = len(shapes[graph.tied().get(name, name)])
        problem = (
            "belongs to the model itself, which cannot be wrapped"
            if not holder
            else f"is of the module {holder!r}, which target_modules chose already"
            if holder in chosen
            else f"has {axes} axes, and only 2 and 3 are supported"
            if axes not in (2, 3)
            else None
        )
        if problem:
            raise TargetError(f"target_parameters: {name!r} {problem} (HF PEFT refuses it too).\n  Name the parameters more closely.")
        found.append(name)
    return tuple(sorted(found, key=lambda name: order[name.rpartition(".")[0]]))


def _saved(targets: Targets, graph: Graph, task_type: str | None, chosen: Collection[str]) -> tuple[str, ...]:
    ends = (*(targets.modules_to_save or ()), *SAVED_BY_TASK.get(task_type or "", ()))
    found = tuple(name for name in (*graph.modules(), *graph.aliases()) if name.endswith(ends)) if ends else ()
    for name in found:
        kind = graph.modules()[graph.aliases().get(name, name)].class_name
        if name in chosen or kind in NOT_SAVED:
            what = "gets an adapter from target_modules" if name in chosen else f"is a {kind}"
            raise UnsupportedLayerError(
                f"modules_to_save takes every module whose name ends with {' or '.join(map(repr, ends))}.\n"
                f"  {name!r} is one and {what} (HF PEFT refuses it too). Name the modules in full, and exclude them from target_modules."
            )
    return found


def _nothing(targets: Targets, rules: Rules, graph: Graph, verdicts: Mapping[str, Verdict]) -> str:
    outcomes = {verdict.outcome for verdict in verdicts.values()}
    if outcomes and outcomes <= {EXCLUDED, SAVED}:
        return "every module is excluded, by exclude_modules or modules_to_save.\n  Narrow them."
    shown = "target_parameters" if rules.target is None else f"target_modules={targets.target_modules!r:.80}"
    lines = [f"{shown} matches none of the {len(verdicts)} modules."]
    near = nearest(rules.target, targets.target_parameters, graph)
    lines.append(f"  The nearest names: {', '.join(near)}." if near else "  No name is near; `graph.modules()` lists them.")
    held = [verdict.reason for verdict in verdicts.values() if verdict.near]
    lines.append(f"  {held[0]}" if held else "  A list matches whole names or ends from a dot on; text is a regex of the whole name.")
    return "\n".join(lines)


def _notes(targets: Targets, rules: Rules, graph: Graph, verdicts: Mapping[str, Verdict], parameters: tuple[str, ...]) -> Iterator[str]:
    outcomes = {verdict.outcome for verdict in verdicts.values()}
    if verdicts and targets.exclude_modules and not outcomes & {EXCLUDED, SAVED}:
        yield f"exclude_modules={targets.exclude_modules!r:.80} excludes nothing."
    if verdicts and targets.target_modules and TARGET not in outcomes:
        yield f"target_modules={targets.target_modules!r:.80} matches no module."
    if targets.target_parameters and not parameters:
        yield f"target_parameters={targets.target_parameters!r:.80} matches no parameter."
    if isinstance(targets.target_modules, tuple):
        for entry in unmatched(targets.target_modules, graph):
            yield f"target_modules: {entry!r} matches no module."
