"""A port that is a file: answers to exported cases, worked out anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

from peft_ref.check.case import Case
from peft_ref.check.corpus import corpus
from peft_ref.check.oracle import smoke_case
from peft_ref.check.port import BrokenPort, Port, Reply, Skipped
from peft_ref.check.protocol import read_info, read_reply
from peft_ref.check.result import PortInfo


@final
class AnswersPort(Port):
    """`{"port": {"name": ..., "dtype": ...}, "answers": [{"id": ..., "answer": {...}}, ...]}`, replies as in spec/protocol.md."""

    def __init__(self, path: Path, validate: bool = False) -> None:
        self._path, self._validate = path, validate
        self._replies: dict[str, Any] = {}

    def start(self) -> PortInfo:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BrokenPort(f"{self._path}: cannot be read as JSON: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("answers"), list):
            raise BrokenPort(f'{self._path}: expected {{"port": {{"name": ..., "dtype": ...}}, "answers": [...]}}.')
        info = read_info(data.get("port"), self._validate)
        for reply in data["answers"]:
            if not isinstance(reply, dict) or not isinstance(reply.get("id"), str):
                raise BrokenPort(f'{self._path}: every entry of "answers" is an object with the "id" of a case.')
            if reply["id"] in self._replies:
                raise BrokenPort(f"{self._path}: the case {reply['id']} is answered twice.")
            self._replies[reply["id"]] = reply
        if unknown := sorted(self._replies.keys() - {case.id for case in (smoke_case(), *corpus())}):
            raise BrokenPort(f"{self._path}: there is no case {unknown[0]!r} ({len(unknown)} such ids); see `peft-ref cases list`.")
        return info

    def ask(self, case: Case) -> Reply:
        if case.id not in self._replies:
            return Skipped("the file has no answer to this case")
        return read_reply(case, self._replies[case.id], self._validate)

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass
