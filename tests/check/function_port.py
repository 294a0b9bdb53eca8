"""A port that is a function of the case, for tests: what it returns is rounded to the port's dtype, as a real port's numbers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import numpy as np

from peft_ref.check.case import ARRAY_OPERATIONS, Answer, Case
from peft_ref.check.diagnose import rounded
from peft_ref.check.port import Answered, Port, Reply, Skipped
from peft_ref.check.result import PortInfo


@final
class FunctionPort(Port):
    """Answers array cases with `answer(case)`; None means it cannot. `about` narrows what it says it can do."""

    def __init__(self, answer: Callable[[Case], Answer | None], dtype: str, about: PortInfo | None = None) -> None:
        self._answer, self._dtype, self._about = answer, dtype, about
        self.asked = 0

    def start(self) -> PortInfo:
        return self._about or PortInfo(name="a function", dtype=self._dtype)

    def ask(self, case: Case) -> Reply:
        self.asked += 1
        answer = self._answer(case) if case.operation in ARRAY_OPERATIONS and case.method != "frozen" else None
        if answer is None:
            return Skipped("not asked of a function")
        return Answered(rounded({name: np.asarray(value, dtype=np.float64) for name, value in answer.items()}, self._dtype))

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass
