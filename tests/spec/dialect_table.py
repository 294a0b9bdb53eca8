"""The table of what HF PEFT answers otherwise, in spec/README.md.   python -m tests.spec.dialect_table   writes it.

Which cases show a dialect is in tests/methods, and tests/ports/test_hf_port.py asks live PEFT whether it is so: these, all of them, and no
other. What is wrong in them, and which clause it breaks, the mistake says.
"""

from __future__ import annotations

from typing import NamedTuple

from peft_ref.check.case import Case
from peft_ref.check.corpus import corpus
from peft_ref.check.mistake import Mistake
from peft_ref.check.mistakes import SUITES
from peft_ref.methods import METHODS
from tests.methods import facts
from tests.spec.pages import METHOD_PAGES, SPEC, entries

BEGIN, END = "<!-- dialects: written by tests/spec/dialect_table.py, do not edit -->", "<!-- end of dialects -->"
DTYPES = ("float64", "float32")
OPERATIONS = ("forward", "backward", "delta", "merge", "unmerge")
KINDS = ("linear", "transposed_linear", "embedding", "conv1d", "conv2d", "conv3d")


class Dialect(NamedTuple):
    method: str
    mistake: Mistake
    cases: dict[str, list[Case]]  # by dtype


def dialects() -> list[Dialect]:
    """Every dialect of PEFT that some case shows, in the methods' order."""
    found = []
    for method in METHODS.weights:
        known = {m.name: m for m in SUITES[method].mistakes}
        for name, shows in sorted(facts(method).dialects.items()):
            cases = {dtype: [case for case in corpus(method) if shows(case.id, dtype)] for dtype in DTYPES}
            found.append(Dialect(method, known[name], cases))
    return found


def table() -> str:
    head = [
        "method",
        "dialect",
        "breaks",
        "what is right",
        "PEFT's numbers are what you get when",
        "asked",
        "on",
        *(f"in {d}" for d in DTYPES),
    ]
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for dialect in dialects():
        method, mistake, cases = dialect
        both = [case for dtype in DTYPES for case in cases[dtype]]
        operations = [o for o in OPERATIONS if any(case.operation == o for case in both)]
        layers = [k for k in KINDS if any(case.layer is not None and case.layer.kind == k for case in both)]
        clause = next(e for e in entries(METHOD_PAGES[method]) if e.id == mistake.clause)
        cells = [
            f"[{METHODS[method].__name__}](methods/{method}.md)",
            f"`{mistake.name}`",
            f"[{clause.id}](methods/{method}.md#{clause.topic.lower()})",
            first_sentence(clause.text),
            mistake.sentence,
            ", ".join(operations),
            ", ".join(layers).replace("transposed_linear", "Conv1D"),
            *(str(len(cases[dtype])) for dtype in DTYPES),
        ]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def first_sentence(text: str) -> str:
    return text.partition(". ")[0].removesuffix(".")


def with_table(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    page = SPEC / "README.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
