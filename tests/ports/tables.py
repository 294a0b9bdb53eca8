"""The tables of spec/protocol.md that the code can write.   python -m tests.ports.tables   writes them."""

from __future__ import annotations

from peft_ref.check.case import config_of
from peft_ref.contracts import EVERY_KIND, KINDS, declared
from peft_ref.layers import CONV_KINDS
from peft_ref.methods import METHODS
from peft_ref.norms import NORM
from peft_ref.report.spec import formula
from tests.methods import made
from tests.ports.page import PAGE

ORDER = ("linear", "transposed_linear", "embedding", "conv1d", "conv2d", "conv3d", NORM)


def written(name: str) -> tuple[str, str]:
    """The comments between which a table stands."""
    return f"<!-- {name}: written by tests/ports/tables.py, do not edit -->", f"<!-- end of {name} -->"


def effects() -> str:
    rows = ["| method | what it does |", "|---|---|"]
    for name in METHODS.weights:
        lines = [line.strip().replace("|", r"\|") for line in formula(name).split("\n\n")[0].splitlines()]
        rows.append(f"| [`{name}`](methods/{name}.md) | {'<br>'.join(f'`{line}`' for line in lines)} |")
    return "\n".join(rows)


def configurations() -> str:
    rows = ["| method | `config` |", "|---|---|"]
    for name in METHODS.weights:
        method = made(name)
        fixed = {"peft_type", *(word for word, said in method.switched_on().items() if said != {})}
        config = config_of(method)
        words = [f'`"{word}": {_json(config[word])}`' for word in config if word in fixed]
        words += [f"`{word}`" for word in config if word not in fixed]
        rows.append(f"| `{name}` | {', '.join(words)} |")
    return "\n".join(rows)


def _json(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def tensors() -> str:
    rows = ["| method | key | shape | on | only with |", "|---|---|---|---|---|"]
    for name, cls in METHODS.weights.items():
        shown = f"`{name}`"
        for shape, keys in declared(cls.params_type).values():
            for key in keys:
                kinds = _kinds(key.kinds & cls.kinds)
                if kinds:
                    rows.append(f"| {shown} | `{key.key}` | `{key.stored or shape}` | {kinds} | {(key.when and f'`{key.when}`') or ''} |")
                    shown = ""
    return "\n".join(rows)


def _kinds(kinds: frozenset[str]) -> str:
    if kinds == EVERY_KIND:
        return "every layer"
    if kinds == KINDS:
        return "every layer but norms"
    short = [k for k in ORDER if k in kinds]
    return ", ".join(short) if not kinds >= CONV_KINDS else ", ".join([*(k for k in short if k not in CONV_KINDS), "convolutions"])


TABLES = {"what methods do": effects, "configurations": configurations, "tensors": tensors}


def with_tables(text: str) -> str:
    for name, table in TABLES.items():
        begin, end = written(name)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table()}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
