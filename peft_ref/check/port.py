"""Whoever is judged: something that answers cases. An array backend in this process, a program on pipes, a file of answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, TypeAlias, final

import numpy as np

from peft_ref.arrays import Array
from peft_ref.backend import Backend
from peft_ref.check.case import TEXT_OPERATIONS, Answer, Case, NDArray, build_attention, build_prompt
from peft_ref.check.oracle import pose, right_answer
from peft_ref.check.prompt_starts import sources_of
from peft_ref.check.result import PortInfo
from peft_ref.methods import METHODS


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
    def forget(self) -> None:
        """Drop whatever the port may keep from earlier questions: a program is started anew for the next one."""

    @abstractmethod
    def close(self) -> None: ...


class BrokenPort(Exception):
    """The port cannot be judged at all; the message says why."""


@final
class BackendPort(Port):
    """Our own mathematics on an array backend, in the given dtype."""

    def __init__(self, backend: Backend, dtype: str) -> None:
        self._backend, self._dtype = backend, dtype

    def start(self) -> PortInfo:
        return PortInfo(
            name=f"peft_ref on {self._backend.name}",
            dtype=self._dtype,
            language="Python",
            version=self._backend.version,
        )

    def ask(self, case: Case) -> Reply:
        if case.operation in TEXT_OPERATIONS:
            return Skipped("about text, not about arrays: every backend gives the same answer")
        try:
            with self._backend.scope():  # JAX computes in float32 outside of it
                return Answered(self._draws(case) if case.operation == "init" else self._arrays(case))
        except Exception as error:  # a backend may raise anything; it costs this case and no other
            return Failed(f"{type(error).__name__}: {error}")

    def _arrays(self, case: Case) -> Answer:
        out = right_answer(case, self._lift)
        return {name: self._backend.to_numpy(array, self._dtype) for name, array in out.items()}

    def _draws(self, case: Case) -> dict[str, Any]:
        """Fresh adapters, each from a generator of its own."""
        if case.method in METHODS.prompts:
            return self._prompts(case)
        if case.method in METHODS.attention:
            return self._blocks(case)
        problem = pose(case, self._lift)
        layer, method = problem.layer, problem.adapters[0].method
        draws = []
        for seed in range(case.question["draws"]):
            start = method.init(layer, problem.W, np.random.default_rng(seed))
            changed = {} if start.W is problem.W else {"weight": layer.unfold(start.W)}
            tensors = {**method.pack(layer, method.with_frozen_bias(start.params, problem.b)), **changed}
            draws.append({name: self._backend.to_numpy(array, self._dtype) for name, array in tensors.items()})
        return {"draws": draws}

    def _prompts(self, case: Case) -> dict[str, Any]:
        method, sources = build_prompt(case.method, case.adapters[0].config), sources_of(case.question, self._lift)
        like = self._lift(np.zeros(1))
        draws = []
        for seed in range(case.question["draws"]):
            start = method.init(like, np.random.default_rng(seed), sources)
            draws.append({name: self._backend.to_numpy(array, self._dtype) for name, array in start.items()})
        return {"draws": draws}

    def _blocks(self, case: Case) -> dict[str, Any]:
        method, hidden = build_attention(case.method, case.adapters[0].config), case.question["attention"]["hidden_size"]
        starts = (method.init(hidden, self._lift(np.zeros(1)), np.random.default_rng(seed)) for seed in range(case.question["draws"]))
        return {"draws": [{key: self._backend.to_numpy(v, self._dtype) for key, v in method.pack(start).items()} for start in starts]}

    def _lift(self, array: NDArray) -> Array:
        return self._backend.from_numpy(array, self._dtype)

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass
