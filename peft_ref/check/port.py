"""Whoever is judged: something that answers cases. An array backend in this process, a program on pipes, a file of answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypeAlias, final

from peft_ref.check.case import ARRAY_OPERATIONS, Answer, Case
from peft_ref.check.oracle import pose, solve
from peft_ref.check.result import PortInfo


class Answered(NamedTuple):
    answer: Answer | dict[str, Any]  # arrays by name, or the JSON of a text operation


class Skipped(NamedTuple):
    reason: str


class Failed(NamedTuple):
    """No usable answer: the port raised, hung, died, flooded or answered garbage."""

    reason: str


Reply: TypeAlias = Answered | Skipped | Failed


class Port(ABC):
    """One who answers cases. `start` comes first; `close` always comes last; after a `Failed` reply the port can still be asked."""

    @abstractmethod
    def start(self) -> PortInfo:
        """What the port says of itself. Raises `BrokenPort` where there is none to be judged."""

    @abstractmethod
    def ask(self, case: Case) -> Reply: ...

    @abstractmethod
    def close(self) -> None: ...


class BrokenPort(Exception):
    """The port cannot be judged at all; the message says why."""


@final
class BackendPort(Port):
    """Our own mathematics on an array backend, in the given dtype."""

    def __init__(self, backend: Any, dtype: str) -> None:
        self._backend, self._dtype = backend, dtype

    def start(self) -> PortInfo:
        return PortInfo(
            name=f"peft_ref on {self._backend.name}",
            dtype=self._dtype,
            language="Python",
            version=self._backend.version,
        )

    def ask(self, case: Case) -> Reply:
        if case.operation not in ARRAY_OPERATIONS:
            return Skipped("not about arrays: every backend gives the same answer")
        backend = self._backend
        try:
            out = solve(pose(case, lambda array: backend.from_numpy(array, self._dtype)), case.operation)
            return Answered({name: backend.to_numpy(array, self._dtype) for name, array in out.items()})
        except Exception as error:  # a backend may raise anything; it costs this case and no other
            return Failed(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        pass
