"""The cases as files: what is asked, and the right answers beside it, for those who want no process."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peft_ref.check.case import ARRAY_OPERATIONS, Case, encode, to_json
from peft_ref.check.corpus import corpus
from peft_ref.check.diagnose import expected_answer
from peft_ref.check.oracle import smoke_case
from peft_ref.check.protocol import VERSION, nest
from peft_ref.check.tolerance import PRECISION


def export(folder: Path, methods: Sequence[str]) -> list[tuple[Path, int]]:
    """Writes `<method>.json` for every method, and `smoke.json`; returns what was written and how many cases it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: Iterable[tuple[str, tuple[Case, ...]]] = [("smoke", (smoke_case(),)), *((m, corpus(m)) for m in methods)]
    written = []
    for name, cases in parts:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(document(cases)) + "\n", encoding="utf-8")
        written.append((path, len(cases)))
    return written


def document(cases: Sequence[Case]) -> dict[str, Any]:
    """Cases with their right answers; for every array answer the dtypes in which bits must match."""
    return {"peft_ref_cases": VERSION, "cases": [{**to_json(c), "expected": right(c)} for c in cases]}


def right(case: Case) -> dict[str, Any]:
    if case.operation in ARRAY_OPERATIONS:
        answer = expected_answer(case, "float64").values
        exact_in = [dtype for dtype in PRECISION if expected_answer(case, dtype).exact]
        return {"answer": nest(case, {k: encode(v) for k, v in answer.items()}), "exact_in": exact_in}
    if case.operation == "init":
        from peft_ref.check.init_laws import laws

        return {"laws": {key: law.text for key, law in laws(case).items()}}
    from peft_ref.check.text import right_text

    return {"answer": right_text(case)}
