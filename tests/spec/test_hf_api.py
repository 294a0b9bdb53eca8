"""spec/hf_api.md says of every public name of PEFT what became of it.   python tests/spec/test_hf_api.py   writes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "spec" / "hf_api.md"
sys.path.insert(0, str(Path(__file__).parents[2]))  # where this file is run

from peft_ref import hf  # noqa: E402
from tests.spec.hf_api import METHODS, NAMES, THROUGH, Different, Left, Row, Same  # noqa: E402

INTRODUCTION = """\
# peft_ref.hf beside HF PEFT

`from peft_ref.hf import ...` has PEFT 0.21.2's names, over models of `peft_ref.nn` and any other graph. This page goes through all of them:
the package's `__all__`, the methods of `PeftModel`, and those that it passes on to its tuner. `tests/spec/test_hf_api.py` writes it from
the table `tests/spec/hf_api.py`, and holds it to PEFT and to `peft_ref.hf`. The rules behind it:

- An argument that cannot be honoured is an error, never ignored in silence. Where PEFT raises, so does this; where PEFT only warns, the
  argument is honoured or refused.
- Randomness is an argument: `rng` (a generator or a seed) where PEFT draws from torch's global generator, seed 0 where none is given.
- A model that is wrapped stays as it is; `BaseModel` is what stands for the torch model, and is called like it.
"""


def words(row: Row) -> str:
    if isinstance(row, Same):
        return f"same: {row.note}" if row.note else "same"
    return f"{'different' if isinstance(row, Different) else 'left out'}: {row.because}"


def table(rows: dict[str, Row]) -> str:
    return "\n".join(["| name | here |", "|---|---|", *(f"| `{name}` | {words(rows[name])} |" for name in sorted(rows))])


def page() -> str:
    parts = (("Names", NAMES), ("Methods of PeftModel", METHODS), ("Methods of PeftModel by way of its tuner", THROUGH))
    return "\n".join([INTRODUCTION, *(f"## {title}\n\n{table(rows)}\n" for title, rows in parts)])


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/spec/test_hf_api.py"


def public(cls: Any) -> set[str]:
    torch = pytest.importorskip("torch")
    return {name for name in dir(cls) if not name.startswith("_")} - set(dir(torch.nn.Module))


@pytest.mark.hf
def test_every_name_of_peft_has_a_row_and_no_row_is_of_another() -> None:
    peft = pytest.importorskip("peft")
    assert NAMES.keys() == set(peft.__all__)


@pytest.mark.hf
def test_every_method_of_pefts_model_has_a_row() -> None:
    peft = pytest.importorskip("peft")
    own = public(peft.PeftModel) | {"forward", "active_adapter", "base_model", "peft_type"}  # a module's, and what __init__ sets
    assert METHODS.keys() == own
    tuners = {name for cls in (peft.LoraModel, peft.IA3Model, peft.LoHaModel) for name in public(cls)}
    assert THROUGH.keys() == tuners - own


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there_unless_it_is_left_out(name: str) -> None:
    assert (name in hf.__all__) == hasattr(hf, name) == (not isinstance(NAMES[name], Left))


@pytest.mark.parametrize("name", {**METHODS, **THROUGH})
def test_a_method_is_there_unless_it_is_left_out(name: str) -> None:
    assert hasattr(hf.PeftModel, name) == (not isinstance({**METHODS, **THROUGH}[name], Left))


def test_what_is_not_pefts_is_said_here() -> None:
    assert set(hf.__all__) - NAMES.keys() == {"BaseModel", "ModelOutput"}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
