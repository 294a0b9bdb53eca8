"""How a method declares its parameters: names, shapes in letters, where each lives in a checkpoint.

class Params(NamedTuple):
    A: Annotated[Array, "r in", Key("lora_A.weight")]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, get_args, get_type_hints

from peft_ref.layers import CONV_KINDS
from peft_ref.norms import NORM

KINDS = frozenset({"linear", "transposed_linear", "embedding"}) | CONV_KINDS  # of the layers that are a linear map of their input
EVERY_KIND = KINDS | {NORM}


@dataclass(frozen=True)
class Key:
    """Where a parameter lives in a checkpoint: its key, its stored shape if that is not its shape, on which layer kinds.

    A shape is letters from the method's `dims`: "r in", "out r/groups". In a stored shape "*k" stands for the kernel's sizes and "*1"
    for as many ones. `when` names what switches the parameter on: a hyper-parameter, or one of `dims` that depends on the layer.

    What is `shared` is one array that every layer of the adapter is given, and stands in a file once, as base_model.<key>: see `common`.
    """

    key: str
    stored: str | None = None
    kinds: frozenset[str] = KINDS - CONV_KINDS
    when: str | None = None
    trained: bool = True  # places in a weight are saved with the rest, are integers, and have no gradient
    shared: bool = False
    saved: str | None = None  # the hyper-parameter that says whether a file holds it; what it does not hold, the seed makes again
    repeated: bool = False  # a file holds what is shared beside every layer too
    derived: bool = False  # in no file: a layer's `start` works it out of its frozen weight and of what is made for all layers


def conv_key(key: str, stored: str, when: str | None = None) -> Key:
    return Key(key, stored, CONV_KINDS, when)


class ParamSpec(NamedTuple):
    field: str
    key: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    trained: bool = True
    shared: bool = False
    saved: bool = True
    repeated: bool = False
    derived: bool = False


def shape_of(letters: str, dims: Mapping[str, int], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes that e.g. "out r/groups *1" stands for."""
    sizes: list[int] = []
    for word in letters.split():
        if word == "*k":
            sizes.extend(kernel)
        elif word == "*1":
            sizes.extend((1,) * len(kernel))
        else:
            size, *divisor = (int(part) if part.isdigit() else dims[part] for part in word.split("/"))
            sizes.append(size // divisor[0] if divisor else size)
    return tuple(sizes)


@cache
def declared(params: type[tuple[Any, ...]]) -> dict[str, tuple[str, tuple[Key, ...]]]:
    """What a Params type says of each field: its shape in letters and its keys."""
    hints = get_type_hints(params, include_extras=True)
    return {name: (get_args(hint)[1], get_args(hint)[2:]) for name, hint in hints.items()}
