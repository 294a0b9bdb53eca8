"""What HF reads and we refuse, live: the last table of spec/hostile.md."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors

from peft_ref.errors import FileFormatError, PeftRefError
from peft_ref.files.adapter import load_config
from peft_ref.files.safetensors import open_file
from tests.hostile.corpus import CONFIG, RIGHT, adapter, joined

CLAIM = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
READ_BY_THE_LIBRARY_ALONE = {
    "33 MB": json.dumps({"x": CLAIM, "__metadata__": {"a": "x" * (33 * 2**20)}}),
    "spaces": " " + json.dumps({"x": CLAIM}),
    "other keys": json.dumps({"x": {**CLAIM, "more": 1}}),
    "a name that steers a terminal": json.dumps({"\x1b[2J": CLAIM}),
    "a name of a megabyte": json.dumps({"x" * 2**20: CLAIM}),
    "a tensor twice": json.dumps({"x": CLAIM})[:-1] + f', "x": {json.dumps(CLAIM)}}}',
    "65 axes": json.dumps({"x": {**CLAIM, "shape": [1] * 65}}),
}
READ_BY_NEITHER = {
    "a byte-order mark": "\ufeff" + json.dumps({"x": CLAIM}),
}


def read_by_the_library(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


@pytest.mark.parametrize("what", [*READ_BY_THE_LIBRARY_ALONE, *READ_BY_NEITHER])
def test_what_the_library_reads_of_headers_that_are_refused_here(what: str, tmp_path: Path) -> None:
    text = {**READ_BY_THE_LIBRARY_ALONE, **READ_BY_NEITHER}[what]
    data = joined(text.encode(), b"\0" * 4)
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(FileFormatError, match=r"a\.safetensors"):
        open_file(tmp_path / "a.safetensors")
    assert read_by_the_library(data) is (what in READ_BY_THE_LIBRARY_ALONE)
    assert read_by_the_library(joined(json.dumps({"x": CLAIM}).encode(), b"\0" * 4))


@pytest.mark.hf
def test_peft_takes_the_last_of_a_key_that_is_there_twice_and_nan(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    adapter(tmp_path)
    whole = json.dumps({key: value for key, value in RIGHT.items() if key != "lora_alpha"})[:-1]
    for said, alpha in (("1", 1.0), ('1, "lora_alpha": 7', 7.0), ("NaN", math.nan), ("1e999", math.inf)):
        (tmp_path / CONFIG).write_text(f'{whole}, "lora_alpha": {said}}}')
        taken = peft.PeftConfig.from_pretrained(str(tmp_path)).lora_alpha
        assert taken == alpha or (math.isnan(alpha) and math.isnan(taken))
        if said != "1":
            with pytest.raises(PeftRefError, match=r"adapter_config\.json"):
                load_config(tmp_path)
