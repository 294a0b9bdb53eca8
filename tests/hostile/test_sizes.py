"""What a configuration may not say, found by the types of its fields; and what it may say and the tensors do not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, get_type_hints

import pytest

from peft_ref.errors import PeftRefError
from peft_ref.files.config import DERIVED, parse
from peft_ref.files.rules import field_names
from peft_ref.methods import METHODS
from tests.methods import facts

NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "9" * 399, str(2**63))
NUMBERS = {
    (name, word): get_type_hints(cls)[word]
    for name, cls in METHODS.items()
    for word in field_names(cls)
    if word not in DERIVED and get_type_hints(cls)[word] in (int, float, int | None, float | None, int | float | None)
}


def start(name: str) -> dict[str, Any]:
    cls = METHODS[name]
    return {
        "peft_type": cls.peft_type,
        "task_type": "CAUSAL_LM",
        **cls.switched_on(),
        **(facts(name).config if name in METHODS.weights else {}),
    }


def test_there_are_as_many_numbers_as_were_counted() -> None:
    assert len(NUMBERS) >= 150


@pytest.mark.parametrize("name", METHODS)
def test_a_number_that_is_none_is_refused_by_its_name_in_every_method(name: str) -> None:
    for word in [word for method, word in NUMBERS if method == name]:
        whole = json.dumps({key: value for key, value in start(name).items() if key != word})[:-1]
        for text in (*NO_NUMBERS, *(["true", "2.5", '"2"'] if NUMBERS[name, word] is int else ['"2"', "[2]"])):
            with pytest.raises(PeftRefError, match=r"adapter_config\.json") as caught:
                parse(f'{whole}, "{word}": {text}}}')
            assert word in str(caught.value) or "digits" in str(caught.value), (word, text)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc")
def test_a_size_of_a_billion_takes_no_memory_that_the_file_does_not_have() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.hostile.sizes"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(row["integers"] for row in rows) > 90
    wrong = [row for row in rows if row["error"] is not None or row["megabytes"] > 50 or row["seconds"] > 5]
    assert not wrong
