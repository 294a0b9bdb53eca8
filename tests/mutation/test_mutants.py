"""The mutation run itself: what is mutated, that a mutant is at work in its function, that the list of the equivalent is not stale."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mutmut")
from tests.mutation.equivalent import equivalents
from tests.mutation.mutants import Mutant, mutants
from tests.mutation.running import install
from tests.mutation.sources import FILES, ROOT

SOURCE = '''"""A text."""

class Scaled:
    """1 + 1"""
    r: int = 8

    @property
    def scale(self) -> float:
        if self.r < 0:
            raise ValueError(f"r={self.r + 1}: {'no' + 'thing'}", 3)
        return 2 * self.r
'''


def test_numbers_operators_and_defaults_are_mutated_but_no_message(tmp_path: Path) -> None:
    file = tmp_path / "scaled.py"
    file.write_text(SOURCE)
    found = {(m.function, m.new) for m in mutants(file)}
    assert found == {
        ("", "r: int = 9"),
        ("", "r: int = None"),
        ("Scaled.scale", "if self.r <= 0:"),
        ("Scaled.scale", "if self.r < 1:"),
        ("Scaled.scale", "return 3 * self.r"),
        ("Scaled.scale", "return 2 / self.r"),
    }


def test_who_runs_a_function_is_asked_about_its_defaults_too(tmp_path: Path) -> None:
    """The line of the `def` itself runs on import alone."""
    file = tmp_path / "scaled.py"
    file.write_text("def scaled(x: int, by: int = 2) -> int:\n    more = x\n    return more + by\n\n\nr = 7\n")
    assert {m.new: m.lines for m in mutants(file)} == {
        "def scaled(x: int, by: int = 3) -> int:": (1, 3),
        "more = None": (2, 2),
        "return more - by": (3, 3),
        "r = 8": (6, 6),
        "r = None": (6, 6),
    }


def one(file: str, new: str) -> Mutant:
    return next(m for m in mutants(FILES[file]) if m.new == new)


def in_a_child(say: Callable[[], bool]) -> bool:
    """What is installed stays; so it is not in this process."""
    if not (child := os.fork()):
        try:
            os._exit(0 if say() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_mutant_is_at_work_in_objects_that_were_made_before() -> None:
    from peft_ref.methods.lokr import LoKr, factors

    before, default = LoKr(r=4, alpha=2), LoKr()

    def changed() -> bool:
        install(one("lokr", "return self.alpha * self.r"))
        install(one("lokr", "r: int = 9"))
        install(one("lokr", "if factor > 0 or n % factor == 0:"))
        return (before.scale, LoKr().r, factors(7, 2)) == (8.0, 9, (2, 3))

    assert (before.scale, default.r, factors(7, 2)) == (0.5, 8, (1, 7))
    assert in_a_child(changed)
    assert (before.scale, LoKr().r, factors(7, 2)) == (0.5, 8, (1, 7))


def test_a_table_is_changed_for_those_who_imported_it() -> None:
    from peft_ref.methods import waveft

    before = waveft.LOW_PASS["db1"]

    def changed() -> bool:
        install(one("wavelets", '"db1": (2.0, 1.0),'))
        return waveft.LOW_PASS["db1"] == (2.0, 1.0)

    assert in_a_child(changed)
    assert waveft.LOW_PASS["db1"] == before == (1.0, 1.0)


@pytest.mark.parametrize("file", sorted({file for file, _, _ in equivalents()}))
def test_every_equivalent_mutant_is_still_made(file: str) -> None:
    made = {m.key for m in mutants(FILES[file])}
    stale = [key for key in equivalents() if key[0] == file and key not in made]
    assert not stale


@pytest.mark.mutation
def test_no_mutant_survives_that_is_not_equivalent() -> None:
    assert subprocess.run([sys.executable, "-m", "tests.mutation"], cwd=ROOT, check=False).returncode == 0
