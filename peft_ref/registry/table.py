"""Methods by name. `METHODS` is the registry that everything reads: laws, files, judge.

A registry is a mapping that only grows by `register`, which refuses what is incomplete or taken: a name, a class name, a peft_type with its
flag, a tuner prefix, a checkpoint key. What came with the package cannot be replaced or taken out.

An installed package announces methods in the entry-point group `peft_ref.methods`, name = "module:Class". They are looked up once, when the
first configuration is read and by the command line: never by an import.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from typing import Any, TypeVar, final

from peft_ref.attending import AttentionMethod
from peft_ref.contracts import Method, WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.prompts import Prompt
from peft_ref.registry.announced import announced
from peft_ref.registry.complete import check_complete, keys_of, told_by_prefix
from peft_ref.registry.names import REMOVED, TUNER_PREFIXES

GROUP = "peft_ref.methods"

M = TypeVar("M", bound=Method)


@final
class Registry(Mapping[str, type[Method]]):
    """Methods by name, in alphabetical order."""

    def __init__(self, built: Mapping[str, tuple[str, str]]) -> None:
        """`built` says the class and the peft_type of every method that comes with the package, so that none is imported to be found:
        {"dora": ("DoRA", "LORA")} is DoRA in peft_ref/methods/dora.py, a kind of LORA.
        """
        self._built = dict(built)
        self._registered: dict[str, type[Method]] = {}
        self._discovered: tuple[str, ...] | None = None

    def __getitem__(self, name: str) -> type[Method]:
        if name in self._registered:
            return self._registered[name]
        class_name, _ = self._built[name]
        cls: type[Method] = getattr(import_module(f"peft_ref.methods.{name}"), class_name)
        return cls

    def __iter__(self) -> Iterator[str]:
        return iter(sorted([*self._built, *self._registered]))

    def __len__(self) -> int:
        return len(self._built) + len(self._registered)

    def __repr__(self) -> str:
        return f"<methods: {', '.join(self)}>"

    @property
    def registered(self) -> frozenset[str]:
        """The names that did not come with the package."""
        return frozenset(self._registered)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes' names, without importing one."""
        return tuple(sorted([*(built for built, _ in self._built.values()), *(cls.__name__ for cls in self._registered.values())]))

    def class_called(self, class_name: str) -> type[Method] | None:
        """The class of that name, built in or registered; no other is imported for it."""
        if (name := next((n for n, (built, _) in self._built.items() if built == class_name), None)) is not None:
            return self[name]
        return next((cls for cls in self._registered.values() if cls.__name__ == class_name), None)

    @property
    def weights(self) -> dict[str, type[WeightMethod[Any]]]:
        """The methods that map a layer's weight."""
        return {name: cls for name, cls in self.items() if issubclass(cls, WeightMethod)}

    @property
    def prompts(self) -> dict[str, type[Prompt]]:
        """The methods that put vectors before a model's own."""
        return {name: cls for name, cls in self.items() if issubclass(cls, Prompt)}

    @property
    def attention(self) -> dict[str, type[AttentionMethod[Any]]]:
        """The methods that add to what an attention block returns."""
        return {name: cls for name, cls in self.items() if issubclass(cls, AttentionMethod)}

    def register(self, name: str, cls: type[M]) -> type[M]:
        """Let `cls` be a method like those built in; returns it. Raises `ConfigError` where it is incomplete or something is taken."""
        check_complete(name, cls)
        self._refuse_taken(name, cls)
        self._registered[name] = cls
        return cls

    def unregister(self, name: str) -> None:
        """Undo `register`, for a notebook's next try or at the end of a test."""
        if name not in self._registered:
            raise ConfigError(f"there is no registered method {name!r}.\n  Registered: {', '.join(sorted(self._registered)) or 'none'}.")
        del self._registered[name]

    def method_class(self, peft_type: str, flags: Collection[str] = (), where: str = "") -> type[Method]:
        """The class for a peft_type and the switches that are on, such as ("LORA", {"use_dora"}) or ("MISS", {"init_weights='bat'"}).

        Raises `ConfigError` where it is not built here, which lists what is.
        """
        at = f"{where}: " if where else ""
        siblings = self.siblings(peft_type)
        if not siblings:
            raise ConfigError(f"{at}{self._absent(peft_type)}")
        if unknown := sorted(set(flags) - {str(cls.switch()) for cls in siblings}):
            raise ConfigError(f"{at}{peft_type} with {' and '.join(unknown)} is not built here.\n  Built: {self.names()}.")
        if len(flags) > 1:
            raise ConfigError(f"{at}{' and '.join(sorted(flags))} are both on, which no method here is.\n  Switch one off.")
        wanted = next(iter(flags), None)
        if (found := next((cls for cls in siblings if cls.switch() == wanted), None)) is None:
            raise ConfigError(f"{at}plain {peft_type} is not built here.\n  Built: {self.names()}.")
        return found

    def siblings(self, peft_type: str) -> tuple[type[Method], ...]:
        """Every class of one peft_type, those of installed packages too: a flag of theirs must not be read as a plain method."""
        self.discover()
        return tuple(self[name] for name in self if self._peft_type(name) == peft_type)

    def names(self) -> str:
        """What is built, as adapter_config.json says it: "IA3, LOHA, LORA, LORA with use_dora"."""
        return ", ".join(sorted(cls.peft_type if cls.flag is None else f"{cls.peft_type} with {cls.switch()}" for cls in self.values()))

    def discover(self) -> tuple[str, ...]:
        """Register what installed packages announce, once; returns what did not work, one sentence each."""
        if self._discovered is None:
            self._discovered = ()  # what is loaded may come back here
            problems = []
            for point in announced(GROUP):
                try:
                    if self.get(point.name) is not (cls := point.load()):
                        self.register(point.name, cls)
                except Exception as error:  # somebody's import may raise anything; it costs that method and no other
                    problems.append(f"method {point.name!r} of {point.value}: {type(error).__name__}: {error}")
            self._discovered = tuple(problems)
        return self._discovered

    def _peft_type(self, name: str) -> str:
        return self._registered[name].peft_type if name in self._registered else self._built[name][1]

    def _absent(self, peft_type: str) -> str:
        what = "A method of HF PEFT" if peft_type in TUNER_PREFIXES else REMOVED.get(peft_type, "No method of HF PEFT either")
        lines = [f"peft_type={str(peft_type)!r:.60} is not built here.", *(self._discovered or ()), f"{what}. Built: {self.names()}."]
        return "\n  ".join(lines)

    def _refuse_taken(self, name: str, cls: type[Method]) -> None:
        def refuse(what: str, remedy: str) -> None:
            raise ConfigError(f"method {name!r}: {what}.\n  {remedy}")

        if name in self:
            refuse(f"the name is taken, by {self[name].__name__}", "Choose another; what came with the package stays.")
        theirs = {c: c.peft_type for c in self.values()}
        if twin := next((c for c in theirs if c.__name__ == cls.__name__), None):
            refuse(f"the class name {cls.__name__} is taken, by {twin.__module__}", "Rename the class: it becomes peft_ref's attribute.")
        if twin := next((c for c in theirs if (c.peft_type, c.switch()) == (cls.peft_type, cls.switch())), None):
            mine = cls.peft_type if cls.flag is None else f"{cls.peft_type} with {cls.switch()}"
            refuse(f"peft_type {mine} is taken, by {twin.__name__}", "Take another peft_type, or a flag that a config can switch on.")
        others = [c for c, kind in theirs.items() if not _related(kind, cls.peft_type)]
        for c in others:
            if shared := sorted(keys_of(c) & keys_of(cls)):
                refuse(f"the checkpoint key {shared[0]!r} is taken, by {c.__name__}", "A file must tell whose it is: use another key.")
        prefixes = {c.tuner_prefix: c.__name__ for c in others}
        prefixes |= {p: f"PEFT's {kind}" for kind, p in TUNER_PREFIXES.items() if not _related(kind, cls.peft_type)}
        for prefix, owner in prefixes.items():
            if prefix.startswith(cls.tuner_prefix) or cls.tuner_prefix.startswith(prefix):
                refuse(
                    f"the tuner prefix {cls.tuner_prefix!r} is taken: {prefix!r} is that of {owner}", "Choose one that begins otherwise."
                )
        if (right := TUNER_PREFIXES.get(cls.peft_type, cls.tuner_prefix)) != cls.tuner_prefix:
            refuse(
                f"tuner_prefix={cls.tuner_prefix!r}, but PEFT's of {cls.peft_type} is {right!r}", "Use PEFT's, or a peft_type of your own."
            )
        for key in sorted(told_by_prefix(cls)):
            if not key.startswith(cls.tuner_prefix):
                refuse(f"the checkpoint key {key!r} does not begin with {cls.tuner_prefix!r}, its prefix", "Rename the key.")


def _related(one: str, other: str) -> bool:
    """Whether two peft_types may share keys: the same, or two that PEFT gives one prefix, as LORA and ADALORA."""
    return one == other or TUNER_PREFIXES.get(one, one) == TUNER_PREFIXES.get(other, other)
