"""Suites by the name of their method. `SUITES` is the one that the judge reads; `register_suite` adds that of a registered method.

A registered method without a suite can be judged, on no case; one is announced by a package in the entry-point group `peft_ref.suites`,
name = "module:SUITE", and found when the corpus is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

from peft_ref.check.case import ATTENTION_OPERATIONS, PROMPT_OPERATIONS, build_attention, build_method, build_prompt
from peft_ref.check.mistake import Suite
from peft_ref.check.variants import LAYERS
from peft_ref.errors import ConfigError
from peft_ref.methods import METHODS
from peft_ref.registry.announced import announced

GROUP = "peft_ref.suites"
NOTHING = Suite(variants=(), mistakes=())


@final
class Suites(Mapping[str, Suite]):
    """What is asked about each method, and its known mistakes."""

    def __init__(self, built: Mapping[str, Suite]) -> None:
        self._built = dict(built)
        self._registered: dict[str, Suite] = {}
        self._discovered: tuple[str, ...] | None = None

    def __getitem__(self, name: str) -> Suite:
        return self._registered[name] if name in self._registered else self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted([*self._built, *self._registered]))

    def __len__(self) -> int:
        return len(self._built) + len(self._registered)

    def of(self, name: str) -> Suite:
        """The suite of a method; one that asks nothing for a registered method that has none."""
        return NOTHING if name in METHODS.registered and name not in self._registered else self[name]

    def register(self, name: str, suite: Suite) -> None:
        """Ask this about the registered method `name`. Raises `ConfigError` where it cannot be asked, or something is asked already."""
        if name not in METHODS.registered:
            raise ConfigError(f"suite {name!r}: no method of that name was registered.\n  Call register_method({name!r}, ...) first.")
        if name in self._registered:
            raise ConfigError(f"suite {name!r}: the method has one.\n  SUITES.unregister({name!r}) takes it out.")
        _check_asked(name, suite)
        variants = [v.name for v in suite.variants] + [v.name for v in suite.prompts] + [v.name for v in suite.attention]
        for what, names in (("variants", variants), ("mistakes", [m.name for m in suite.mistakes])):
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise ConfigError(f"suite {name!r}: two {what} are called {twice[0]!r}.\n  Give each a name of its own.")
        for variant in suite.variants:
            if unknown := sorted(set(variant.layers) - LAYERS.keys()):
                raise ConfigError(f"suite {name!r}, variant {variant.name!r}: no layer {unknown[0]!r}.\n  There are {', '.join(LAYERS)}.")
            for config in variant.configs:
                build_method(name, config)
        for asked in suite.prompts:
            if unknown := sorted(set(asked.operations) - set(PROMPT_OPERATIONS)):
                raise ConfigError(
                    f"suite {name!r}, variant {asked.name!r}: no operation {unknown[0]!r}.\n  There are {', '.join(PROMPT_OPERATIONS)}."
                )
            build_prompt(name, asked.config).shapes()  # a size that is missing is an error
        for added in suite.attention:
            if unknown := sorted(set(added.operations) - set(ATTENTION_OPERATIONS)):
                raise ConfigError(
                    f"suite {name!r}, variant {added.name!r}: no operation {unknown[0]!r}.\n  There are {', '.join(ATTENTION_OPERATIONS)}."
                )
            build_attention(name, added.config).spec(added.block.hidden_size)
        self._registered[name] = suite

    def unregister(self, name: str) -> None:
        """Undo `register`."""
        if name not in self._registered:
            raise ConfigError(f"there is no registered suite {name!r}.\n  Registered: {', '.join(sorted(self._registered)) or 'none'}.")
        del self._registered[name]

    def discover(self) -> tuple[str, ...]:
        """Register the suites of installed packages, once, and their methods first; returns what did not work, one sentence each."""
        METHODS.discover()
        if self._discovered is None:
            self._discovered = ()  # what is loaded may come back here
            problems = []
            for point in announced(GROUP):
                try:
                    if self._registered.get(point.name) is not (suite := point.load()):
                        self.register(point.name, suite)
                except Exception as error:  # somebody's import may raise anything; it costs that suite and no other
                    problems.append(f"suite {point.name!r} of {point.value}: {type(error).__name__}: {error}")
            self._discovered = tuple(problems)
        return self._discovered


_ASKED_WITH = {"variants": "Variant", "prompts": "PromptVariant", "attention": "AttentionVariant"}


def _check_asked(name: str, suite: Suite) -> None:
    """Raise `ConfigError` where a suite asks nothing, or asks with another kind of variant than the method's."""
    if name in METHODS.prompts:
        own, what = "prompts", "is a prompt, which has no layers"
    elif name in METHODS.attention:
        own, what = "attention", "adds to an attention block, and has no layer"
    else:
        own, what = "variants", "maps a layer's weight and is no prompt"
    asked = {kind: [v.name for v in getattr(suite, kind)] for kind in _ASKED_WITH}
    if others := [v for kind, names in asked.items() if kind != own for v in names]:
        raise ConfigError(f"suite {name!r}, variant {others[0]!r}: {METHODS[name].__name__} {what}.\n  Ask with {_ASKED_WITH[own]}.")
    if not asked[own]:
        raise ConfigError(f"suite {name!r} has no variants, so nothing would be asked.\n  Give one {_ASKED_WITH[own]} at least.")
