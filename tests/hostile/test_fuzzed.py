"""Any bytes at all: Hypothesis spoils what is right, at random bytes and at random places of its JSON.

CI        300 inputs for each of five searches
sweep     10,000 for each, and 400,000 of atheris, which follows the branches that are taken:  pytest tests/hostile -m sweep
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_ref.files.safetensors import serialize
from tests.hostile.corpus import RIGHT, joined, lora_tensors, split
from tests.hostile.fuzzing import a_config, an_index, check_config, check_index, check_tensor_file

FEW, MANY, MANY_MORE = 300, 10_000, 400_000
FILE = serialize({**lora_tensors(), "x": lora_tensors()["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] > 0}, {"a": "b"})
WORDS = (
    *(None, True, False, 0, 1, -1, 2, 3.5, 8, 10**9, 2**31, 2**63, 2**64, 10**30, "", "a", "F32", "F4", "Q7", "BOOL", "q_proj"),
    *("all-linear", "(a|a)*", "(", "../x", "\x1b[2J", "a\0", "\u202e", "nan", [], [0], [0, 4], [2**62, 4], [[]], {}, {"a": 1}, {"q": []}),
    *("LORA", "DORA", "ADALORA", "LOHA", "IA3", "VERA", "PREFIX_TUNING", "XLORA", "OFT", "CAUSAL_LM", "lora_only", "gaussian", "pissa"),
)
KEYS = (
    "r",
    "lora_alpha",
    "use_dora",
    "use_rslora",
    "bias",
    "init_lora_weights",
    "layers_pattern",
    "eva_config",
    "num_virtual_tokens",
    "zz",
)
RAW = ("NaN", "-Infinity", "1e999", "9" * 5000, "1" * 300, '"\\ud800"', "[" * 300 + "]" * 300, "-0", "1e-999", '{"a":1,"a":2}')


@st.composite
def flipped(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes changed, cut out and put in; the beginning, which says most, more often."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(out) - 1) | st.integers(0, min(40, len(out) - 1))) if out else 0
        how = draw(st.integers(0, 3))
        if how == 0 and out:
            out[at] = draw(st.integers(0, 255))
        elif how == 1:
            del out[at : at + draw(st.integers(1, 30))]
        elif how == 2:
            out[at:at] = draw(st.binary(max_size=12))
        elif out:
            out[at] = ord(draw(st.sampled_from('0123456789-+.eE"[]{}:,\\ntf ')))
    return bytes(out)


@st.composite
def reshaped(draw: st.DrawFn, value: Any, keys: tuple[str, ...] = ()) -> str:
    """The JSON text of the value with up to four places changed: replaced, renamed, removed, or said twice."""
    value = json.loads(json.dumps(value))
    raw: dict[str, str] = {}
    for _ in range(draw(st.integers(1, 4))):
        inside = value
        while True:
            places = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            if not places:
                break
            at: Any = draw(st.sampled_from(places))
            if isinstance(inside[at], dict | list) and draw(st.booleans()):
                inside = inside[at]
                continue
            how = draw(st.integers(0, 5))
            if how == 0:
                mark = f"RAW{len(raw)}"
                raw[mark], inside[at] = draw(st.sampled_from(RAW)), mark
            elif how == 1:
                del inside[at]
            elif how == 2 and isinstance(inside, dict):
                inside[draw(st.sampled_from([*keys, "a", "\x1b", "", "\n"]))] = deepcopy(draw(st.sampled_from(WORDS)))
            elif how == 3 and isinstance(inside[at], int):
                inside[at] += draw(st.sampled_from([-8, -1, 1, 4, 64, 2**32]))
            else:
                inside[at] = deepcopy(draw(st.sampled_from(WORDS)))
            break
    text = json.dumps(value)
    for mark, words in raw.items():
        text = text.replace(json.dumps(mark), words)
    return text


HEADER, DATA = split(FILE)
SEARCHES: dict[str, tuple[Callable[[bytes], bool], st.SearchStrategy[bytes]]] = {
    "bytes of a tensor file": (check_tensor_file, flipped(FILE)),
    "the JSON of a tensor file": (check_tensor_file, reshaped(HEADER).map(lambda text: joined(text.encode(), DATA))),
    "bytes of a configuration": (check_config, flipped(a_config())),
    "the JSON of a configuration": (check_config, reshaped({**RIGHT, **json.loads(a_config())}, KEYS).map(str.encode)),
    "the JSON of an index": (check_index, reshaped(json.loads(an_index())).map(str.encode)),
}


def searched(name: str, examples: int) -> Counter[bool]:
    """How many inputs were taken and how many refused; what is neither is raised."""
    check, strategy = SEARCHES[name]
    found = Counter[bool]()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples == FEW, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def search(data: bytes) -> None:
        found[check(data)] += 1

    search()
    return found


@pytest.mark.parametrize("name", SEARCHES)
def test_spoilt_files_are_refused_or_right(name: str) -> None:
    found = searched(name, FEW)
    assert found.total() >= FEW * 9 // 10  # fewer where Hypothesis has seen all
    assert found[False] > FEW // 5
    if not name.startswith("bytes"):
        assert found[True] > 5  # the search has two sides


@pytest.mark.sweep
@pytest.mark.parametrize("name", SEARCHES)
def test_many_spoilt_files_are_refused_or_right(name: str) -> None:
    assert searched(name, MANY).total() > MANY // 2


@pytest.mark.sweep
@pytest.mark.parametrize("target", ["tensors", "config", "index"])
def test_atheris_finds_nothing(target: str, tmp_path: Any) -> None:
    pytest.importorskip("atheris")
    runs = MANY_MORE if target != "index" else MANY_MORE // 4
    command = [sys.executable, "-m", "tests.hostile.atheris_target", target, f"-atheris_runs={runs}", "-rss_limit_mb=2048", "-timeout=20"]
    done = subprocess.run([*command, f"-artifact_prefix={tmp_path}/", "-max_len=4096", "-seed=1"], capture_output=True, text=True)
    told = done.stderr[-3000:] + done.stdout[-1000:]
    assert done.returncode == 0, told
    assert int(re.findall(r"Done (\d+)", told)[-1]) >= runs, told
