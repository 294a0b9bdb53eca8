"""HF's names here are HF's, live."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.hf

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING  # noqa: E402

from peft_ref.methods import METHODS  # noqa: E402
from peft_ref.registry import CONFIG_NAMES, REMOVED, TUNER_PREFIXES, PeftType, TaskType  # noqa: E402


def test_the_methods_are_peft_s() -> None:
    assert {kind.value for kind in PeftType} == {kind.value for kind in peft.PeftType}
    assert len(PeftType) == 45


def test_the_tasks_are_peft_s_in_its_order() -> None:
    assert [task.value for task in TaskType] == [task.value for task in peft.TaskType]


def test_the_prefixes_are_peft_s() -> None:
    assert dict(TUNER_PREFIXES) == {kind.value: prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()}


def test_the_configurations_are_called_as_peft_calls_them() -> None:
    assert dict(CONFIG_NAMES) == {kind.value: config.__name__ for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    for name in CONFIG_NAMES.values():
        assert hasattr(peft, name)


def test_what_was_removed_is_removed() -> None:
    for name in REMOVED:
        assert name not in list(peft.PeftType)
        assert name in (peft.PeftType.__doc__ or ""), "PEFT's own list still names it"


def test_every_method_built_has_peft_s_type_and_prefix() -> None:
    for name in METHODS.keys() - METHODS.registered:
        cls = METHODS[name]
        assert TUNER_PREFIXES[cls.peft_type] == cls.tuner_prefix, name


def test_the_table_says_every_methods_peft_type() -> None:
    for name, cls in METHODS.items():
        assert cls in METHODS.siblings(cls.peft_type), name
        assert all(one.peft_type == cls.peft_type for one in METHODS.siblings(cls.peft_type))


def test_the_relatives_of_a_method_are_found_without_the_others() -> None:
    code = "import sys; from peft_ref.methods import METHODS; METHODS.siblings('LORA'); assert 'peft_ref.methods.oft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_is_text() -> None:
    assert PeftType.LORA == "LORA"
    assert json.dumps({"peft_type": PeftType.LORA, "task_type": TaskType.SEQ_CLS}) == '{"peft_type": "LORA", "task_type": "SEQ_CLS"}'
    assert f"{PeftType.IA3}" == "IA3"
