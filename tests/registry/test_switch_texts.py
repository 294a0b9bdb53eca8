"""Methods of one peft_type that a text selects, as PEFT's `init_weights="bat"` does: `flag` is the key and `flag_value` the text."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from peft_ref.check.case import build_method, config_of
from peft_ref.errors import ConfigError
from peft_ref.files.config import flatten, from_dict
from peft_ref.methods import METHODS, method_class
from peft_ref.methods.dora import DoRA
from peft_ref.methods.lora import LoRA
from tests.registry.test_refusals import another

TEXTS = {"flag": "kind", "peft_type": "OUTER", "tuner_prefix": "outer_"}


@pytest.fixture
def family(own: ModuleType) -> dict[str, Any]:
    """Two methods beside the plain one, each for a text of its own."""
    made = {
        text: another(own, class_name=text.title(), flag_value=text, params_type=own.Outer.params_type, **TEXTS) for text in ("bat", "mini")
    }
    for text, cls in made.items():
        METHODS.register(text, cls)
    return {"plain": own.Outer, **made}


def test_the_very_text_selects_and_any_other_is_the_plain_method(family: dict[str, Any]) -> None:
    for text, cls in family.items():
        data = {"peft_type": "OUTER", "alpha": 2.5, "kind": text, "target_modules": ["q"]}
        config = from_dict(data)
        assert type(config.method) is cls
        assert flatten(config) == data
    assert type(from_dict({"peft_type": "OUTER", "kind": "Bat"}).method) is family["plain"]
    assert type(from_dict({"peft_type": "OUTER", "kind": True}).method) is family["plain"]
    assert type(from_dict({"peft_type": "OUTER"}).method) is family["plain"]


def test_a_case_says_the_text(family: dict[str, Any]) -> None:
    config = config_of(family["mini"](alpha=2.0))
    assert config == {"peft_type": "OUTER", "alpha": 2.0, "kind": "mini"}
    assert build_method("mini", config) == family["mini"](alpha=2.0)


def test_a_class_is_asked_for_by_key_and_text(family: dict[str, Any]) -> None:
    assert family["bat"].switch() == "kind='bat'"
    assert method_class("OUTER", ["kind='bat'"]) is family["bat"]
    assert method_class("OUTER") is family["plain"]
    with pytest.raises(ConfigError, match=r"kind='cat' is not built here.\n.*OUTER, OUTER with kind='bat', OUTER with kind='mini'"):
        method_class("OUTER", ["kind='cat'"])


def test_a_text_is_taken_once(family: dict[str, Any], own: ModuleType) -> None:
    again = another(own, flag_value="bat", params_type=own.Outer.params_type, **TEXTS)
    with pytest.raises(ConfigError, match="peft_type OUTER with kind='bat' is taken, by Bat"):
        METHODS.register("again", again)


def test_what_the_switch_says_is_true_or_a_text(own: ModuleType) -> None:
    for value in (False, 1, None):
        with pytest.raises(ConfigError, match=f"flag_value={value}: True, or the text"):
            METHODS.register("mine", another(own, flag_value=value, params_type=own.Outer.params_type, **TEXTS))


def test_a_switch_of_no_text_is_on_for_any_true_value() -> None:
    assert (DoRA.switch(), LoRA.switch()) == ("use_dora", None)
    assert DoRA.is_selected({"use_dora": 1})
    assert not DoRA.is_selected({"use_dora": None})
    assert not LoRA.is_selected({"use_dora": False})
