"""Mutants at work, each in a forked child: its code is put into the function that is there, so that whoever holds the function runs it.

No file is changed, nothing is imported again, and torch is imported once. What stands in a class or a module (a default, a table) is
computed anew from the mutated source and put over the old one.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from tests.mutation.evidence import Evidence, runs
from tests.mutation.mutants import Mutant
from tests.mutation.sources import module_of

KILLED, SURVIVED, BROKEN, TIMEOUT, UNRUN = "killed", "survived", "does not import", "timeout", "never run"
GENERATED = {"__init__", "__dataclass_fields__", "__match_args__", "__replace__", "_field_defaults", "__new__"}


class Result(NamedTuple):
    outcome: str
    by: str = ""
    seconds: float = 0.0
    tried: int = 0
    running: int = 0  # tests that run the mutated line


def install(mutant: Mutant) -> None:
    module = import_module(module_of(mutant.file))
    code = compile(mutant.source, str(module.__file__), "exec", dont_inherit=True)
    if mutant.function and (found := [c for c in _codes(code) if c.co_qualname == mutant.function]):
        function = _function(module, mutant.function)
        if len(found) == 1 and function.__code__.co_freevars == found[0].co_freevars and function.__code__ != found[0]:
            function.__code__ = found[0]
            return
    _over(module, code)


def _codes(code: CodeType) -> Any:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from _codes(const)


def _function(module: Any, name: str) -> Any:
    owner: Any = module
    for part in name.split("."):
        owner = vars(owner)[part]
    for inner in ("fget", "__func__", "__wrapped__"):
        owner = getattr(owner, inner, None) or owner
    return owner


def _over(module: Any, code: CodeType) -> None:
    """Everything that the mutated module defines, put where the sound one has it; functions in place."""
    fresh = dict.fromkeys(("__name__", "__file__", "__package__", "__spec__"))
    space: dict[str, Any] = {name: getattr(module, name) for name in fresh}
    exec(code, space)
    for name, value in space.items():
        old = getattr(module, name, None)
        if isinstance(value, type) and isinstance(old, type) and value.__module__ == module.__name__:
            for word, inner in vars(value).items():
                if (
                    not isinstance(inner, FunctionType | property | classmethod | staticmethod) and not word.startswith("__")
                ) or word in GENERATED:
                    type.__setattr__(old, word, inner)
                elif isinstance(inner, FunctionType) and isinstance(was := vars(old).get(word), FunctionType):
                    was.__defaults__, was.__kwdefaults__ = inner.__defaults__, inner.__kwdefaults__
        elif isinstance(value, FunctionType) and isinstance(old, FunctionType):
            if value.__module__ == module.__name__:
                old.__defaults__, old.__kwdefaults__ = value.__defaults__, value.__kwdefaults__
        elif not name.startswith("__"):
            for holder in _importers(name, old) if name in vars(module) else ():
                setattr(holder, name, value)
            setattr(module, name, value)


def _importers(name: str, value: Any) -> list[Any]:
    return [m for m in list(sys.modules.values()) if str(getattr(m, "__name__", "")).startswith("peft_ref.") and vars(m).get(name) is value]


class Judge:
    """Which tests to ask first is learnt: the one that killed this mutant in an earlier run, then those that killed others, per second."""

    def __init__(self, evidence: Evidence, limit: float, killers: dict[tuple[str, str, str], str]) -> None:
        self.evidence, self.limit, self.killers = evidence, limit, killers
        self.kills = defaultdict[str, Counter[str]](Counter)
        gc.collect()
        gc.freeze()

    def judge(self, mutant: Mutant) -> Result:
        records, begin = self.evidence.records, time.perf_counter()
        items = self.evidence.running(mutant.file, mutant.lines) if mutant.function else self.evidence.using(mutant.file)
        if not items:
            return Result(UNRUN)
        chosen, total = [], 0.0
        items = self._ordered(mutant, items)
        for item in items:
            total += records[item.nodeid]["seconds"]
            if total < self.limit or not chosen:
                chosen.append(item)
        status, said = self._forked(mutant, chosen)
        spent, (n, by) = round(time.perf_counter() - begin, 2), (int(said[:6] or 0), said[6:])
        if os.WIFSIGNALED(status):
            outcome = TIMEOUT if os.WTERMSIG(status) == signal.SIGALRM else f"killed by signal {os.WTERMSIG(status)}"
        else:
            outcome = {0: SURVIVED, 1: KILLED}.get(os.WEXITSTATUS(status), BROKEN)
        if outcome == KILLED:
            self.kills[mutant.file][by] += 1
        return Result(outcome, by, spent, n, len(items))

    def _ordered(self, mutant: Mutant, items: list[Any]) -> list[Any]:
        """First those that killed, by kills a second; then quick ones, and of each function one before the next."""
        seconds, kills, nth = {i.nodeid: self.evidence.records[i.nodeid]["seconds"] for i in items}, self.kills[mutant.file], Counter[str]()
        killer = self.killers.get(mutant.key)
        ranks = {}
        for item in sorted(items, key=lambda item: seconds[item.nodeid]):
            function = item.nodeid.partition("[")[0]
            ranks[item.nodeid] = (1 + nth[function]) * (0.01 + seconds[item.nodeid])
            nth[function] += 1
        return sorted(items, key=lambda i: (i.nodeid != killer, -kills[i.nodeid] / (seconds[i.nodeid] + 0.01), ranks[i.nodeid]))

    def _forked(self, mutant: Mutant, chosen: list[Any]) -> tuple[int, str]:
        read, write = os.pipe()
        if not (child := os.fork()):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            self._ask(mutant, chosen, write)
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        return os.waitpid(child, 0)[1], said

    def _ask(self, mutant: Mutant, chosen: list[Any], write: int) -> None:
        """In the child, which never returns."""
        status, said = 2, ""
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            signal.alarm(30)
            install(mutant)
            self.evidence.forget()
            status = 0
            for n, item in enumerate(chosen, 1):
                signal.alarm(20 + int(20 * self.evidence.records[item.nodeid]["seconds"]))
                said = f"{n:6}"
                if not runs(item, chosen[n] if n < len(chosen) else None):
                    status, said = 1, f"{n:6}{item.nodeid}"
                    break
        except BaseException:
            pass
        finally:
            os.write(write, said.encode())
            os._exit(status)
