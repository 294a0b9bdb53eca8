"""A case: one question to a port, as plain JSON. Arrays are nested lists; a port needs a JSON parser and nothing else.

Numbers survive: Python writes the shortest decimal that reads back as the same float64, NaN and infinities travel as strings.
`spec/protocol.md` is the port author's view of this file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from peft_ref.attending import AttentionMethod
from peft_ref.contracts import Method, WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.methods import METHODS
from peft_ref.norms import NORM, Norm
from peft_ref.prompts import Prompt

M = TypeVar("M", bound=Method)
NDArray: TypeAlias = np.ndarray[Any, Any]
# What a port answers: arrays by name ("y", "x", "weight", "0.lora_A.weight"), or a JSON object for the operations about text.
Answer: TypeAlias = dict[str, NDArray]

LAYER_OPERATIONS = ("forward", "backward", "delta", "merge", "unmerge")  # about adapters on one layer
PROMPT_OPERATIONS = ("prompt", "prompt_backward", "saved", "splice")  # about vectors put before a model's own
ATTENTION_OPERATIONS = ("attention", "attention_backward")  # about what is added to an attention block's output
TRAINING_OPERATIONS = ("aux_loss", "allocate")  # about all modules together, step by step
ARRAY_OPERATIONS = (*LAYER_OPERATIONS, *PROMPT_OPERATIONS, *ATTENTION_OPERATIONS, *TRAINING_OPERATIONS)
BACKWARD_OPERATIONS = ("backward", "prompt_backward", "attention_backward")
TEXT_OPERATIONS = ("targets", "config", "state_dict")
OPERATIONS = (*ARRAY_OPERATIONS, "init", *TEXT_OPERATIONS)


@dataclass(frozen=True, eq=False, kw_only=True)
class CaseAdapter:
    """One active adapter: its configuration and its tensors under their checkpoint keys."""

    config: Mapping[str, Any]
    tensors: Mapping[str, NDArray]
    dropout: tuple[NDArray, float] | None = None  # mask (1 keeps) and p


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    id: str
    method: str
    operation: str
    clause: str
    layer: Layer | None = None
    weight: NDArray | None = None
    bias: NDArray | None = None
    adapters: tuple[CaseAdapter, ...] = ()
    x: NDArray | None = None
    dy: NDArray | None = None
    merged_weight: NDArray | None = None
    merged_bias: NDArray | None = None
    question: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what else is asked, its numbers as arrays


def build_method(name: str, config: Mapping[str, Any]) -> WeightMethod[Any]:
    """The value of a method of weights for a case's configuration; a key that is no hyper-parameter of the method is an error."""
    return _built(METHODS.weights[name], name, config)


def build_prompt(name: str, config: Mapping[str, Any]) -> Prompt:
    """The same of a method of prompts."""
    return _built(METHODS.prompts[name], name, config)


def build_attention(name: str, config: Mapping[str, Any]) -> AttentionMethod[Any]:
    """The same of a method that adds to attention."""
    return _built(METHODS.attention[name], name, config)


def _built(cls: type[M], name: str, config: Mapping[str, Any]) -> M:
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # every method is a dataclass
    switches = {"peft_type", cls.flag}
    if unknown := config.keys() - fields - switches:
        raise ConfigError(f"case of {name}: {', '.join(sorted(unknown))} are no hyper-parameters of {cls.__name__}.")
    return cls(**{k: v for k, v in config.items() if k in fields})


def config_of(method: Method) -> dict[str, Any]:
    """The configuration of a method as a case carries it."""
    words: dict[str, Any] = dataclasses.asdict(method)  # type: ignore[call-overload]  # every method is a dataclass
    config = {"peft_type": method.peft_type, **{word: as_json(value) for word, value in words.items()}}
    return {**method.switched_on(), **config}


def as_json(value: Any) -> Any:
    """A map or a tuple within a configuration as JSON has it."""
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


# ---- JSON


def to_json(case: Case) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": case.id,
        "method": case.method,
        "operation": case.operation,
        "clause": case.clause,
    }
    if case.layer is not None:
        out["layer"] = {
            **layer_to_json(case.layer),
            "weight": encode(case.weight),
            "bias": encode(case.bias),
        }
    if case.adapters:
        out["adapters"] = [
            {
                "config": dict(a.config),
                "tensors": {k: encode(v) for k, v in a.tensors.items()},
                "dropout": None if a.dropout is None else {"mask": encode(a.dropout[0]), "p": a.dropout[1]},
            }
            for a in case.adapters
        ]
    for name in ("x", "dy"):
        if getattr(case, name) is not None:
            out[name] = encode(getattr(case, name))
    if case.merged_weight is not None:
        out["merged"] = {"weight": encode(case.merged_weight), "bias": encode(case.merged_bias)}
    return {**out, **map_arrays(encode, case.question)}


def from_json(data: Mapping[str, Any]) -> Case:
    """The case that `to_json` wrote."""
    layer = data.get("layer")
    merged = data.get("merged") or {}
    known = {"id", "method", "operation", "clause", "layer", "adapters", "x", "dy", "merged"}
    return Case(
        id=data["id"],
        method=data["method"],
        operation=data["operation"],
        clause=data["clause"],
        layer=None if layer is None else layer_from_json(layer),
        weight=None if layer is None else decode(layer["weight"]),
        bias=None if layer is None else decode(layer["bias"]),
        adapters=tuple(
            CaseAdapter(
                config=a["config"],
                tensors={k: _decode(v) for k, v in a["tensors"].items()},
                dropout=None if a["dropout"] is None else (_decode(a["dropout"]["mask"]), a["dropout"]["p"]),
            )
            for a in data.get("adapters", ())
        ),
        x=decode(data.get("x")),
        dy=decode(data.get("dy")),
        merged_weight=decode(merged.get("weight")),
        merged_bias=decode(merged.get("bias")),
        question=_question({k: v for k, v in data.items() if k not in known}, data["operation"]),
    )


def map_arrays(f: Callable[[NDArray], Any], question: Any) -> Any:
    """The question with `f` of every array in it."""
    if isinstance(question, np.ndarray):
        return f(question)
    if isinstance(question, Mapping):
        return {k: map_arrays(f, v) for k, v in question.items()}
    return [map_arrays(f, v) for v in question] if isinstance(question, list | tuple) else question


def _question(value: Any, operation: str) -> Any:
    """A question as it was before `encode`: where arrays answer, every list of numbers in it was an array."""
    if operation not in (*ARRAY_OPERATIONS, "init") or not isinstance(value, Mapping | list):
        return value
    if isinstance(value, Mapping):
        return {k: _question(v, operation) for k, v in value.items()}
    return [_question(v, operation) for v in value] if _holds_objects(value) else _decode(value)


def _holds_objects(value: list[Any]) -> bool:
    return any(isinstance(v, Mapping) or (isinstance(v, list) and _holds_objects(v)) for v in value)


def layer_to_json(layer: Layer) -> dict[str, Any]:
    if isinstance(layer, Linear):
        return {"kind": layer.kind, "in_features": layer.in_features, "out_features": layer.out_features}
    # Whether there is a bias, "bias" beside the weight says.
    fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.name != "bias"}
    if isinstance(layer, Norm):
        fields = {k: fields[k] for k in ("features", "eps", "centred")}
    if isinstance(layer, Embedding):
        fields = {k: fields[k] for k in ("num_embeddings", "embedding_dim")}
    return {"kind": layer.kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}


def layer_from_json(data: Mapping[str, Any]) -> Layer:
    kind, bias = data["kind"], data.get("bias", ()) is not None
    if kind in ("linear", "transposed_linear"):
        return Linear(
            in_features=data["in_features"],
            out_features=data["out_features"],
            transposed=kind == "transposed_linear",
            bias=bias,
        )
    if kind == "embedding":
        return Embedding(num_embeddings=data["num_embeddings"], embedding_dim=data["embedding_dim"])
    if kind == NORM:
        return Norm(features=data["features"], eps=data["eps"], centred=data["centred"], bias=bias)
    geometry = {k: tuple(data[k]) for k in ("kernel_size", "stride", "padding", "dilation")}
    return Conv(in_channels=data["in_channels"], out_channels=data["out_channels"], groups=data["groups"], bias=bias, **geometry)


def encode(array: NDArray | None) -> Any:
    """Nested lists of JSON numbers; a number that is not finite becomes a string."""
    if array is None:
        return None
    if array.dtype.kind in "iub":
        return array.astype(int).tolist()
    if np.all(np.isfinite(array)):
        return np.asarray(array, dtype=np.float64).tolist()
    return _name_nonfinite(np.asarray(array, dtype=np.float64).tolist())


def _name_nonfinite(value: Any) -> Any:
    if isinstance(value, list):
        return [_name_nonfinite(v) for v in value]
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def decode(value: Any) -> NDArray | None:
    return None if value is None else _decode(value)


def _decode(value: Any) -> NDArray:
    """Nested lists as an array: integers stay integers, "nan", "inf" and "-inf" are read. Ragged lists raise ValueError."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError("the nested lists are ragged or too deep: every row of an array must be equally long") from None
    if array.dtype.kind in "US" or array.dtype == object:
        array = np.asarray(value, dtype=object).astype(np.float64)
    if array.dtype.kind not in "iufb":
        raise ValueError(f"an array of numbers was expected, got {array.dtype}")
    return array
