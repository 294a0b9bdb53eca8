"""HF PEFT's configurations, live: defaults, refusals, and a fuzzed set read, meant and written alike."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.utils.other import get_pattern_key  # noqa: E402

from peft_ref.errors import PeftRefError  # noqa: E402
from peft_ref.files.adapter import (  # noqa: E402
    CONFIG,
    WEIGHTS,
)
from peft_ref.files.config import ALPHAS, DERIVED, PATTERNS_UNREAD, RANKS, from_dict, parse, render  # noqa: E402
from peft_ref.files.rules import TASK_TYPES, field_names  # noqa: E402
from peft_ref.methods import METHODS  # noqa: E402
from peft_ref.registry import CONFIG_NAMES  # noqa: E402
from tests.files.peft_models import RANDOM, Net, random_peft_config  # noqa: E402
from tests.methods import facts  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("quiet")]
nn = torch.nn


@pytest.mark.parametrize("name", METHODS)
def test_an_absent_key_has_peft_s_default(name: str) -> None:
    method = METHODS[name]
    theirs = getattr(peft, CONFIG_NAMES[method.peft_type])
    needed = {**facts(name).required, **({"task_type": "CAUSAL_LM"} if name == "cpt" else {})}
    ours = from_dict({"peft_type": method.peft_type, **needed, **method.switched_on()})
    default = theirs(**needed)
    for field in field_names(method):
        if field not in DERIVED and field != method.flag:  # a map that switches it on is absent by default
            value = getattr(ours.method, field)
            assert (list(value) if isinstance(value, tuple) else value) == getattr(default, field), field
    for part in (ours.targets, ours.patterns):
        for field in field_names(type(part)):
            if hasattr(default, field):
                want = getattr(default, field)
                assert getattr(part, field) == ({} if want is None and field == "rank_pattern" else want), field


def test_the_task_types_are_peft_s() -> None:
    assert tuple(t.value for t in peft.TaskType) == TASK_TYPES


def test_peft_refuses_what_we_refuse() -> None:
    for arguments in (
        {"lora_bias": True, "use_dora": True},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        {"layers_pattern": "h"},
        {"target_modules": "q", "layers_to_transform": [0]},
        {"target_modules": "q", "layers_pattern": "h", "layers_to_transform": None},
        {"use_dora": True, "megatron_config": {"a": 1}},
        {"task_type": "COOKING"},
    ):
        with pytest.raises(ValueError):
            peft.LoraConfig(**arguments)
        with pytest.raises(PeftRefError):
            from_dict({"peft_type": "LORA", **arguments})
    with pytest.raises(ValueError, match="subset"):
        peft.IA3Config(target_modules=["q"], feedforward_modules=["w"])
    for arguments in ({"r": 0}, {"rank_pattern": {"q": 0}}, {"bias": "some"}, {"init_lora_weights": "magic"}):
        with pytest.raises((ValueError, NotImplementedError, AttributeError)):
            peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["q"], **arguments))
        with pytest.raises(PeftRefError):
            from_dict({"peft_type": "LORA", "target_modules": ["q"], **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"total_step": None},
        {"total_step": 0},
        {"orth_reg_weight": -0.1},
        {"tinit": 6, "tfinal": 4},
        {"use_dora": True},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    ],
    ids=str,
)
def test_peft_refuses_what_we_refuse_of_adalora(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        peft.AdaLoraConfig(**{"total_step": 10, **arguments})
    with pytest.raises(PeftRefError):
        from_dict({"peft_type": "ADALORA", "total_step": 10, **arguments})


@pytest.mark.parametrize("name", ["beta1", "beta2"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_peft_refuses_a_moving_average_without_memory_or_without_news(name: str, beta: float) -> None:
    with pytest.raises(AssertionError):
        peft.get_peft_model(Net(), peft.AdaLoraConfig(total_step=10, target_modules=["q"], **{name: beta}))
    with pytest.raises(PeftRefError, match=name):
        from_dict({"peft_type": "ADALORA", "total_step": 10, name: beta})


def _said(value: Any) -> Any:
    """A value as JSON has it: a map is another class on each side, and a list a tuple here."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))  # type: ignore[arg-type]


def test_random_configurations_of_peft_are_written_back_to_the_byte_and_mean_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(31)
    names = ["layers.0.q", "layers.1.q", "layers.0.up", "layers.1.up", "conv2", "q", "xq"]
    for i in range(150):
        theirs = random_peft_config(rng, list(RANDOM)[i % len(RANDOM)])
        theirs.save_pretrained(str(tmp_path))
        text = (tmp_path / CONFIG).read_text()
        ours = parse(text)
        assert render(ours) == text, i
        theirs = peft.PeftConfig.from_pretrained(str(tmp_path))  # PEFT sorts the patterns when it saves
        for field in field_names(type(ours.method)):
            if field not in DERIVED:
                assert _said(getattr(ours.method, field)) == _said(getattr(theirs, field))
        for name in names:
            if theirs.peft_type == "IA3":
                if theirs.feedforward_modules is not None:
                    expected = peft.IA3Model._check_target_module_feedforward(theirs, name)
                    assert ours.method_for(name).is_feedforward == expected  # type: ignore[attr-defined]
                continue
            method: Any = ours.method_for(name)
            for pattern, words in (("rank_pattern", RANKS), ("alpha_pattern", ALPHAS)):
                given, unread = getattr(theirs, pattern, None), theirs.peft_type in PATTERNS_UNREAD
                for field in () if given is None or unread else set(words) & set(field_names(type(method))):
                    assert getattr(method, field) == given.get(get_pattern_key(list(given), name), getattr(theirs, field))


def test_saving_with_peft_can_change_which_pattern_is_first(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q"], rank_pattern={"q": 2, "layers.0.q": 3})
    config.save_pretrained(str(tmp_path))
    after = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert get_pattern_key(list(config.rank_pattern), "layers.0.q") == "q"
    assert get_pattern_key(list(after.rank_pattern), "layers.0.q") == "layers.0.q"
    ours = from_dict({"peft_type": "LORA", "rank_pattern": {"q": 2, "layers.0.q": 3}})
    (tmp_path / CONFIG).write_text(render(ours))
    read = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert get_pattern_key(list(read.rank_pattern), "layers.0.q") == "q"  # what we write keeps its meaning


def test_torch_writes_the_same_bytes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from peft_ref.files.safetensors import open_file, serialize

    torch.manual_seed(0)
    dtypes = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int8", "uint8", "bool"]
    tensors = {f"{i}.{d}": (torch.randn(3, i + 1) * 3).to(getattr(torch, d)) for i, d in enumerate(dtypes)}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    file = open_file(tmp_path / WEIGHTS)
    arrays = {name: file.read(name) for name in file.entries}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(arrays[name].astype(np.float64), tensor.to(torch.float64).numpy())
    assert serialize(arrays, file.metadata) == (tmp_path / WEIGHTS).read_bytes()
    assert os.path.getsize(tmp_path / WEIGHTS) == file.path.stat().st_size
