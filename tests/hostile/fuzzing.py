"""What is asked of any bytes: an error of ours, or an answer that is right. Hypothesis and atheris bring the bytes.

A safetensors file that is read here, the library reads too, and sees the same; one that the library reads and we do not is refused for one
of the reasons in `STRICTER`. A configuration that is taken holds finite numbers only, and is written back as it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from peft_ref.contracts import WeightMethod
from peft_ref.errors import LONGEST, PeftRefError
from peft_ref.files.adapter import from_state_dict
from peft_ref.files.config import DERIVED, parse, render
from peft_ref.files.rules import field_names
from peft_ref.files.safetensors import dtypes, open_file
from peft_ref.graph import CheckpointGraph
from tests.hostile.corpus import INDEX, MODULES, RIGHT, lora_tensors

# What the library reads and we do not, by our messages; spec/hostile.md says why.
STRICTER = (
    r"a tensor is called .*\n  At most 1000 are read, and none that cannot be printed",
    r"is described by .*\n  expected dtype, shape and data_offsets",  # more keys than these
    r"the header begins with",  # spaces before the brace
    r"expected a list of up to 64 sizes",
    r"is more than any memory holds",
    r"says .* twice",
    r"JSON of up to [0-9,]+ values",
    r"is not JSON \(a number of",
    r"__metadata__ is not a map",
)
PLACE = Path(tempfile.gettempdir() if not os.path.isdir("/dev/shm") else "/dev/shm") / f"peft-ref-fuzz-{os.getpid()}"
PLACE.mkdir(exist_ok=True)


def _refusal(error: PeftRefError, path: Path | str) -> str:
    message = str(error)
    assert str(path) in message, message
    assert len(message) <= LONGEST + 100, len(message)
    assert message.replace("\n", "").replace("\t", "").isprintable(), message
    return message


def check_tensor_file(data: bytes) -> bool:
    """Whether it was read."""
    path = PLACE / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        theirs: Mapping[str, Any] | None = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError:
        theirs = None
    try:
        file = open_file(path)
        ours = {name: (entry.dtype, entry.shape, bytes(file.raw(name).data)) for name, entry in file.entries.items()}
        arrays = [file.read(name) for name, entry in file.entries.items() if entry.dtype in dtypes()]
    except PeftRefError as error:
        message = _refusal(error, path)
        assert theirs is None or any(re.search(reason, message) for reason in STRICTER), message
        return False
    assert sum(array.nbytes for array in arrays) <= len(data)
    known = {name: claim for name, claim in ours.items() if claim[0] in _NAMES}
    if theirs is None:  # a dtype from the future, which the library refuses and here is copied
        assert len(known) < len(ours), ours
        return True
    assert known.keys() == theirs.keys()
    for name, (dtype, shape, raw) in known.items():
        claim = theirs[name]
        assert (dtype, list(shape), raw) == (claim["dtype"], list(claim["shape"]), bytes(claim["data"])), name
    return True


_NAMES = {
    *("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64", "C64"),
    *("F6_E2M3", "F6_E3M2", "F4"),
}
TENSORS = lora_tensors()


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _numbers(inner)


def check_config(data: bytes) -> bool:
    """Whether it was taken."""
    where = "some/adapter_config.json"
    try:
        config = parse(data, where)
        if config.text is not None:  # a method that PEFT has renamed is written under its new name
            assert render(config).encode() == data
        values = [getattr(config.method, name) for name in field_names(type(config.method)) if name not in DERIVED]
        assert all(math.isfinite(n) and abs(n) < 2**63 for n in _numbers(values))
    except PeftRefError as error:
        _refusal(error, where)
        return False
    with contextlib.suppress(PeftRefError):
        if isinstance(config.method, WeightMethod):
            for name in MODULES:
                config.method_for(name)
        from_state_dict(config, TENSORS)
    return True


def check_index(data: bytes) -> bool:
    """The same of the index of a checkpoint of one file; whether it was taken."""
    (PLACE / INDEX).write_bytes(data)
    try:
        graph = CheckpointGraph(PLACE)
        graph.modules()
    except PeftRefError as error:
        _refusal(error, PLACE)
        return False
    assert set(graph.parameters()) == set(json.loads(data)["weight_map"])
    return True


def an_index() -> bytes:
    from peft_ref.files.safetensors import serialize

    (PLACE / "shard.safetensors").write_bytes(serialize({"a.weight": np.zeros((2, 2)), "b.weight": np.ones(3)}, {}))
    return json.dumps({"metadata": {}, "weight_map": {"a.weight": "shard.safetensors", "b.weight": "shard.safetensors"}}).encode()


def a_config() -> bytes:
    return json.dumps({**RIGHT, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q": 1.5}, "bias": "none"}).encode()
