"""adapter_config.json: one flat dict that is four things, kept apart here and written back as one.

    method          the mathematics: peft_type and the switches choose the class, its fields are the hyper-parameters
    targets         where it goes: target_modules and what narrows them down
    patterns        where the method differs: rank_pattern, alpha_pattern, feedforward_modules, and block_size_pattern or
                    n_frequency_pattern of the methods that have such a size. AdaLoRA's rank_pattern is not by pattern
                    and no rank: {"<module>.lora_E": [which triplets its training kept]}, and alpha_pattern it does not read
    beside          what an adapter does where it does not do its method: trainable_token_indices, once the modules are known
    housekeeping    everything else, also what a newer PEFT added: carried along, never interpreted

What was read and not changed is written back to the byte. A key that is absent has PEFT's default.

HF      writes json.dumps(indent=2, sort_keys=True). That sorts the patterns too, although their first match wins: PEFT's own save can
        change which rank a module gets. Here the patterns keep their order, which PEFT then reads as it was meant.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_type_hints

from peft_ref.attending import AttentionMethod
from peft_ref.contracts import Method, WeightMethod
from peft_ref.errors import ConfigError, naming
from peft_ref.files.removed import as_of_today, is_removed
from peft_ref.files.rules import (
    MOST,
    MOST_SAVED,
    check,
    check_kept,
    check_names,
    check_pattern,
    check_types,
    field_names,
    init_as_saved,
    start_as_saved,
    switch_as_saved,
)
from peft_ref.files.tokens import TAKERS, WORD, TokensBeside, tokens_asked
from peft_ref.graph.pattern_keys import Keys
from peft_ref.graph.patterns import SECONDS_PER_NAME, Matcher
from peft_ref.graph.targets import Targets, is_feedforward
from peft_ref.graph.targets import check as check_targets
from peft_ref.methods import METHODS, method_class
from peft_ref.prompts import Prompt
from peft_ref.reading.documents import CONFIG, OWN, Limit, parsed

# fields of a method that patterns decide, module by module, or the sizes of all modules together, or the frozen weight
DERIVED = frozenset({"budget", "clusters", "diagonal", "entries", "is_feedforward", "live_r", "ranks", "widest_in", "widest_out"})
RANKS = ("r", "effective_rank")
ALPHAS = ("lora_alpha", "alpha")
LAMBDAS = ("delora_lambda",)
SIZES_BY_ANY_PATTERN = frozenset({"WAVEFT"})  # read like a rank_pattern; the others' must end the name after a dot
SIZES = ("block_size", "n_frequency")  # hyper-parameters that `<name>_pattern` changes
PATTERNS_UNREAD = frozenset({"HIRA"})  # PEFT reads its rank_pattern for a second adapter on a layer only: HIRA-Q3
COMPARED = ("modules_to_save", "feedforward_modules", "layers_pattern")  # with the end of every name, one by one
KEPT = "lora_E"  # the ending of a module's key in AdaLoRA's rank_pattern


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """For which modules the method has another rank or scale, or is in a feed-forward block."""

    rank_pattern: Mapping[str, Any] = field(default_factory=dict)  # ranks; for AdaLoRA lists of booleans
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    lambda_pattern: Mapping[str, float] = field(default_factory=dict)  # DeLoRA's, of what a fresh adapter starts from
    feedforward_modules: str | tuple[str, ...] | None = None
    size_pattern: Mapping[str, int] = field(default_factory=dict)  # in the file <the size's name>_pattern


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    method: Method
    targets: Targets = field(default_factory=Targets)
    patterns: Patterns = field(default_factory=Patterns)
    housekeeping: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, TokensBeside] = field(default_factory=dict, repr=False, compare=False)  # modules with a method of their own
    text: str | None = field(default=None, repr=False, compare=False)  # as it was read, for what has not changed since

    def method_for(self, module_name: str) -> WeightMethod[Any]:
        """The method of one module, with the rank, scale and place in the block that the patterns give it."""
        if module_name in self.beside:
            return self.beside[module_name]
        if not isinstance(self.method, WeightMethod):
            where = "it goes before its inputs" if isinstance(self.method, Prompt) else "it adds to attention blocks, alike to all of them"
            raise ConfigError(f"{type(self.method).__name__} adapts no layer of a model: {where}.")
        if self.method.peft_type in PATTERNS_UNREAD:
            return self.method
        if module_name not in self._methods:
            self._clock.allow(SECONDS_PER_NAME)
            self._methods[module_name] = self._worked_out(self.method, module_name)
        return self._methods[module_name]

    def _worked_out(self, method: WeightMethod[Any], module_name: str) -> WeightMethod[Any]:
        p, names = self.patterns, field_names(type(method))
        changes: dict[str, Any] = {}
        if "live_r" in names:
            kept = p.rank_pattern.get(f"{module_name}.{KEPT}")
            return method if kept is None else dataclasses.replace(method, live_r=sum(kept))  # type: ignore[type-var]
        for word, fields in (("rank_pattern", RANKS), ("alpha_pattern", ALPHAS), ("lambda_pattern", LAMBDAS), ("size_pattern", SIZES)):
            if (key := self._matching(word, module_name)) is not None:
                changes[_one_of(fields, names, method)] = getattr(p, word)[key]
        if "is_feedforward" in names:
            changes["is_feedforward"] = self._is_feedforward(module_name)
        changed: WeightMethod[Any] = dataclasses.replace(method, **changes) if changes else method  # type: ignore[type-var]
        return changed.on_module(module_name)

    @cached_property
    def tokens(self) -> Mapping[str, TokensBeside]:
        """The tokens that are trained beside the method, by the ends of the layers' names; INPUT is the input embedding's."""
        return tokens_asked(self.housekeeping.get(WORD), type(self).__name__) if self.method.peft_type in TAKERS else {}

    def pattern_key(self, name: str, module_name: str) -> str | None:
        """The key of `rank_pattern` or `alpha_pattern` that decides about this module, where PEFT reads it."""
        if self.method.peft_type in PATTERNS_UNREAD or "live_r" in field_names(type(self.method)):
            return None
        return self._matching(name, module_name)

    def _matching(self, word: str, module_name: str) -> str | None:
        """The first key of a pattern that a name matches: at its end, or, as OSF alone looks for it, anywhere."""
        if self.method.peft_type == "OSF":
            return next((key for key in getattr(self.patterns, word) if self._clock.anywhere(key, module_name)), None)
        return self._keys[word].first(module_name, self._clock)

    @cached_property
    def _keys(self) -> Mapping[str, Keys]:
        below = self.method.peft_type not in SIZES_BY_ANY_PATTERN
        p = self.patterns
        alike = {"rank_pattern": Keys(p.rank_pattern), "alpha_pattern": Keys(p.alpha_pattern), "lambda_pattern": Keys(p.lambda_pattern)}
        return {**alike, "size_pattern": Keys(p.size_pattern, below=below)}

    @cached_property
    def _clock(self) -> Matcher:
        """For the patterns on all modules together: a file may hold one that never ends."""
        return Matcher()

    @cached_property
    def _methods(self) -> dict[str, WeightMethod[Any]]:
        """By module: each is asked for many times."""
        return {}

    def _is_feedforward(self, module_name: str) -> bool:
        modules = self.patterns.feedforward_modules
        if modules is None:
            raise ConfigError(
                "feedforward_modules is null, so PEFT takes the architecture's default, which the file does not tell.\n"
                "  Give the list; [] if no module is in a feed-forward block."
            )
        return is_feedforward(modules, module_name, self._clock)


def parse(text: str | bytes, where: str = "adapter_config.json", limit: Limit = CONFIG) -> AdapterConfig:
    """The configuration that a JSON text holds; bytes are the text as it lies in a file."""
    data = parsed(text, where, limit)
    with naming(where):
        if is_removed(data):
            return _split(as_of_today(data, where), where)
        return dataclasses.replace(_split(data, where), text=text.decode() if isinstance(text, bytes) else text)


def from_dict(data: Mapping[str, Any], where: str = "adapter_config.json") -> AdapterConfig:
    """The configuration that a flat dict holds; undone by `flatten`."""
    return parse(json.dumps(data, indent=2), where, OWN)


def render(config: AdapterConfig) -> str:
    """The JSON text of a configuration, in PEFT's format; what was read and not changed, as it was read."""
    data = flatten(config)
    if config.text is None:
        return json.dumps(data, indent=2)
    before = json.loads(config.text)
    return config.text if json.dumps(data) == json.dumps(before) else json.dumps(data, indent=2)


def flatten(config: AdapterConfig) -> dict[str, Any]:
    """The flat configuration, keys in the order of the file it came from, else sorted as PEFT sorts them."""
    now = _flat(config)
    if config.text is None:
        words = (*field_names(Targets), *field_names(Patterns), *(f"{size}_pattern" for size in SIZES))
        absent = {key for key in words if now.get(key) in (None, {})} - {"target_modules"}
        return {key: now[key] for key in sorted(now.keys() - absent)}
    read = json.loads(config.text)
    before = _flat(_split(read, "adapter_config.json"))
    out = {key: value if now[key] == before.get(key) else now[key] for key, value in read.items() if key in now}
    added = {key: value for key, value in now.items() if key not in read and value != before.get(key)}
    return dict(sorted({**out, **added}.items())) if list(read) == sorted(read) else {**out, **added}


def _split(data: Any, where: str) -> AdapterConfig:
    if not isinstance(data, Mapping) or not isinstance(data.get("peft_type"), str):
        raise ConfigError(f"{where} has no peft_type, the name of the method.\n  Built: {METHODS.names()}.")
    siblings = METHODS.siblings(data["peft_type"])
    flags = frozenset(cls.flag for cls in siblings)
    check(data, where, flags)
    cls = method_class(data["peft_type"], [str(cls.switch()) for cls in siblings if cls.is_selected(data)], where)
    if issubclass(cls, Prompt) and cls.only_task not in (None, task := data.get("task_type")):
        raise ConfigError(f"{where}: {cls.__name__} with task_type={task!r}: it is for {cls.only_task} alone (HF PEFT refuses it too).")
    own = [name for name in field_names(cls) if name in data and name not in DERIVED]
    values = {name: _as_saved(cls, name, data[name], where) for name in own}
    check_types(cls, values, where)
    try:
        method = cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if data["peft_type"] in TAKERS:
        tokens_asked(data.get(WORD), where)
        check_names(data.get(WORD) if isinstance(data.get(WORD), Mapping) else None, f"{where}: {WORD}", MOST_SAVED)
    for name in (*field_names(Targets), *field_names(Patterns), *(f"{size}_pattern" for size in SIZES)):
        check_names(data.get(name), f"{where}: {name}", MOST_SAVED if name in COMPARED else MOST)
    given = {name: data[name] for name in field_names(Targets) if name in data}
    targets = _targets(given, data["peft_type"], where)
    if issubclass(cls, AttentionMethod) and not isinstance(targets.target_modules, str | None):
        raise ConfigError(
            f"{where}: target_modules={targets.target_modules!r:.80} of {cls.peft_type}, which takes the last part of a name (HF PEFT finds"
            " nothing with a list).\n  Give 'self_attn', say, or null for the architecture's own."
        )
    spoken = {c.flag for c in siblings if not isinstance(c.flag_value, str) or c is cls}  # a text that selects nothing stays as it is
    taken = {"peft_type", *spoken, *own, *given, *field_names(Patterns), _size_key(cls)}
    return AdapterConfig(
        method=method,
        targets=targets,
        patterns=_patterns(data, method, where),
        housekeeping={key: value for key, value in data.items() if key not in taken},
    )


def _as_saved(cls: type[Method], name: str, value: Any, where: str) -> Any:
    if name == "init_lora_weights" and cls.peft_type == "LORA":
        return init_as_saved(value, where)
    hint = get_type_hints(cls)[name]
    if hint == bool | str and name == "init_weights":
        return start_as_saved(value, cls.peft_type)
    return switch_as_saved(value) if hint is bool else value


def _flat(config: AdapterConfig) -> dict[str, Any]:
    method, cls = config.method, type(config.method)
    family = [other for other in METHODS.values() if other.peft_type == cls.peft_type]
    switches: dict[str, Any] = {}
    for other in family:
        if other.flag and not isinstance(other.flag_value, str):
            switches[other.flag] = None if isinstance(other.flag_value, type) else False
    switches |= cls.switched_on()  # a map is one of the fields
    fields = {name: _map(value) for name, value in dataclasses.asdict(method).items() if name not in DERIVED}  # type: ignore[call-overload]
    places = {**dataclasses.asdict(config.targets), **dataclasses.asdict(config.patterns)}
    if isinstance(method, Prompt):  # it has no targets
        places = {"modules_to_save": places["modules_to_save"]}
    sizes = places.pop("size_pattern", None)
    if (size_key := _size_key(cls)) is not None:
        places[size_key] = sizes
    return {**config.housekeeping, "peft_type": cls.peft_type, **switches, **fields, **{k: _lists(v) for k, v in places.items()}}


def _patterns(data: Mapping[str, Any], method: Method, where: str) -> Patterns:
    names = field_names(type(method))
    found: dict[str, Mapping[str, Any]] = {}
    for key, fields in (("rank_pattern", RANKS), ("alpha_pattern", ALPHAS), ("lambda_pattern", LAMBDAS)):
        pattern = data.get(key) or {}
        found[key] = dict(pattern)
        if "live_r" in names:
            if key == "rank_pattern":
                check_kept(pattern, method, KEPT, f"{where}: {key}")
            continue
        for expression, value in pattern.items():
            check_pattern(expression, f"{where}: {key}")
            _changed(method, {_one_of(fields, names, method): value}, f"{where}: {key} of {expression!r}")
    modules = _feedforward(data.get("feedforward_modules"), where)
    return Patterns(**found, feedforward_modules=modules, size_pattern=_sizes(data, method, where))


def _size_key(cls: type[Method]) -> str | None:
    """The word of the pattern that changes this method's size module by module."""
    return next((f"{size}_pattern" for size in SIZES if size in field_names(cls)), None)


def _sizes(data: Mapping[str, Any], method: Method, where: str) -> Mapping[str, int]:
    if (key := _size_key(type(method))) is None:
        return {}
    pattern = data.get(key, {})
    if not isinstance(pattern, Mapping):
        raise ConfigError(
            f"{where}: {key} is a {type(pattern).__name__}, {pattern!r:.60} (HF PEFT refuses it too).\n  Give a map, {{}} for none."
        )
    for expression, value in pattern.items():
        check_pattern(expression, f"{where}: {key}")
        _changed(method, {key.removesuffix("_pattern"): value}, f"{where}: {key} of {expression!r}")
    return dict(pattern)


def _changed(method: Method, change: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` where the method does not take the change."""
    check_types(type(method), change, where)
    try:
        dataclasses.replace(method, **change)  # type: ignore[type-var]  # a dataclass
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _one_of(fields: tuple[str, ...], names: tuple[str, ...], method: Method) -> str:
    for name in fields:
        if name in names:
            return name
    raise ConfigError(f"{type(method).__name__} has no {' or '.join(fields)} that a pattern could change.\n  Leave the pattern empty.")


def _targets(given: Mapping[str, Any], peft_type: str, where: str) -> Targets:
    for key in ("target_modules", "exclude_modules"):
        if isinstance(given.get(key), str):
            check_pattern(given[key], f"{where}: {key}")
    try:
        targets = Targets(**given)
        check_targets(targets, peft_type)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return targets


def _feedforward(modules: Any, where: str) -> str | tuple[str, ...] | None:
    if isinstance(modules, str):
        check_pattern(modules, f"{where}: feedforward_modules")
    elif modules is not None and not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
        raise ConfigError(f"{where}: feedforward_modules={modules!r:.80} is no list of names.")
    return tuple(modules) if isinstance(modules, list) else modules


def _lists(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | frozenset | set) else value


def _map(value: Any) -> Any:
    """A map within a configuration, its keys in order, as PEFT writes it."""
    return {key: _lists(value[key]) for key in sorted(value)} if isinstance(value, dict) else _lists(value)
