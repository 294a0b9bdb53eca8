"""The messages between the judge and a port: JSON lines, one question, one answer. `spec/protocol.md` tells it to port authors.

> {"command": "start", "protocol": 1}
< {"name": "my_port", "dtype": "float32", ...}
> {"command": "run", "case": {...}}
< {"id": "...", "answer": {...}}   or   {"id": "...", "skipped": "why"}   or   {"id": "...", "error": "what"}
> {"command": "stop"}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from peft_ref.check import training
from peft_ref.check.case import ARRAY_OPERATIONS, BACKWARD_OPERATIONS, TRAINING_OPERATIONS, Answer, Case, decode, to_json
from peft_ref.check.port import Answered, BrokenPort, Failed, Reply, Skipped
from peft_ref.check.result import PortInfo
from peft_ref.check.tolerance import PRECISION

VERSION = 1
START: dict[str, Any] = {"command": "start", "protocol": VERSION}
STOP: dict[str, Any] = {"command": "stop"}


def run_message(case: Case) -> dict[str, Any]:
    return {"command": "run", "case": to_json(case)}


def read_info(message: Any, validate: bool = False) -> PortInfo:
    """What the answer to "start" says. Raises `BrokenPort` with what is wrong with it."""
    if not isinstance(message, dict) or not isinstance(message.get("name"), str):
        raise BrokenPort(
            f'the answer to start is {_short(message)}; expected an object with at least {{"name": "...", "dtype": "float32"}}.'
        )
    if validate and (problem := violation(message, "info")):
        raise BrokenPort(f"the answer to start does not fit the schema: {problem}")
    dtype = message.get("dtype", "float64")
    if not isinstance(dtype, str) or dtype not in PRECISION:
        raise BrokenPort(f"the port computes in dtype {_short(dtype)}; the judge knows {', '.join(PRECISION)}.")
    return PortInfo(
        name=_short(message["name"]),
        dtype=dtype,
        language=_short(message.get("language") or ""),
        version=_short(message.get("version") or ""),
        homepage=_short(message.get("homepage") or ""),
        operations=_names(message, "operations"),
        methods=_names(message, "methods"),
        layers=_names(message, "layers"),
    )


def _names(message: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = message.get(key) or []
    if not isinstance(names, list) or not all(isinstance(v, str) for v in names):
        raise BrokenPort(f'"{key}" in the answer to start is {_short(names)}; expected a list of names.')
    return tuple(names)


def read_reply(case: Case, message: Any, validate: bool = False) -> Reply:
    """A port's reply to a case; whatever is wrong with it becomes a `Failed` that says what."""
    if not isinstance(message, dict):
        return Failed(f"the reply is no JSON object: {_short(message)}")
    if validate and (problem := violation(message, "reply")):
        return Failed(f"the reply does not fit the schema: {problem}")
    if message.get("id") != case.id:
        return Failed(f"the reply is for case {_short(message.get('id'))}; {case.id} was asked")
    if "skipped" in message:
        return Skipped(_short(message["skipped"], 600) or "no reason given")
    if "error" in message:
        return Failed(f"the port reports: {_short(message['error'], 600)}")
    if not isinstance(message.get("answer"), dict):
        return Failed('the reply has none of "answer", "skipped" and "error"')
    try:
        if case.operation in ARRAY_OPERATIONS:
            return Answered(flatten(message["answer"]))
        return Answered(message["answer"])
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return Failed(f"the answer cannot be read: {_short(str(error))}")


def flatten(answer: Mapping[str, Any]) -> Answer:
    """The arrays of an answer by name: "y", "x", "weight", what is saved by its key, and "0.lora_A.weight" for adapter 0's gradient.

    null means absent.
    """
    out: Answer = {name: _array(name, value) for name, value in training.flat(answer)}
    for name, value in answer.items():
        if name in (*training.TREES, training.STEPS):
            continue
        if name == "adapters":
            for i, tensors in enumerate(value):
                out.update({f"{i}.{key}": _array(key, v) for key, v in tensors.items() if v is not None})
        elif name == "tensors":
            out.update({key: _array(key, v) for key, v in value.items() if v is not None})
        elif value is not None:
            out[name] = _array(name, value)
    return out


def nest(case: Case, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The other way: arrays by name as the nested object a port sends."""
    if case.operation == "saved":
        return {"tensors": dict(flat)}
    if case.operation in TRAINING_OPERATIONS:
        return training.nested(flat)
    out: dict[str, Any] = {}
    adapters: list[dict[str, Any]] = [{} for _ in case.adapters]
    for name, value in flat.items():
        index, _, key = name.partition(".")
        if index.isdigit() and key:
            adapters[int(index)][key] = value
        else:
            out[name] = value
    return {**out, "adapters": adapters} if case.operation in BACKWARD_OPERATIONS else out


def _array(name: str, value: Any) -> np.ndarray[Any, Any]:
    try:
        array = decode(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None
    assert array is not None
    return array.astype(np.float64)


def violation(message: Any, kind: str) -> str:
    """Where `message` breaks the schema's definition `kind` ("start", "run", "info", "reply", "case"), or an empty string."""
    from fastjsonschema import JsonSchemaValueException

    try:
        _validator(kind)(message)
    except JsonSchemaValueException as error:
        where = (error.name or "data").removeprefix("data").removeprefix(".") or "the message"
        return _short(f"{where}: {error.message.removeprefix(error.name or 'data').strip()}", 300)
    return ""


@cache
def _validator(kind: str) -> Callable[[Any], Any]:
    """The compiled check of one definition. What the schema says is the same in every draft since 7, which this library reads."""
    from fastjsonschema import compile as compile_schema

    check: Callable[[Any], Any] = compile_schema({"$defs": schema_document()["$defs"], "allOf": [{"$ref": f"#/$defs/{kind}"}]})
    return check


@cache
def schema_document() -> dict[str, Any]:
    """The JSON Schema of every message."""
    document: dict[str, Any] = json.loads(files("peft_ref.check").joinpath("protocol.schema.json").read_text("utf-8"))
    return document


def _short(value: Any, length: int = 200) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    except RecursionError:
        text = "something nested too deeply"
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"
