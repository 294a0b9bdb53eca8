"""What a method's class says in words, held to PEFT's own tables: its prefix of keys, and the field that drops inputs."""

from __future__ import annotations

from dataclasses import fields

import pytest

pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING  # noqa: E402

from peft_ref.contracts import Method  # noqa: E402
from peft_ref.methods import METHODS  # noqa: E402

pytestmark = pytest.mark.hf
PREFIXES = {kind.value: prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()}
# What these drop is no input of an addition: blocks of a rotation, nothing at all (PEFT's BAT), a layer between an encoder's.
DROP_OTHERWISE = {"boft": "boft_dropout", "oft": "module_dropout", "miss_bat": "miss_dropout"}


@pytest.mark.parametrize("cls", [*METHODS.weights.values(), *METHODS.prompts.values(), *METHODS.attention.values()])
def test_the_prefix_of_a_method_is_pefts(cls: type[Method]) -> None:
    assert cls.tuner_prefix == PREFIXES[cls.peft_type]


@pytest.mark.parametrize("name", METHODS.weights)
def test_the_field_that_drops_inputs_is_named(name: str) -> None:
    cls = METHODS.weights[name]
    words = [field.name for field in fields(cls) if field.name.endswith("dropout") and field.name != "dropout"]  # type: ignore[arg-type]
    assert words == ([cls.dropout] if cls.dropout else [DROP_OTHERWISE[name]] if name in DROP_OTHERWISE else [])
