"""The layer an adapter was made for, as far as its tensors tell.

A method says which shapes its parameters have on a layer. Asked about a layer whose sizes are large primes, it shows where those sizes
stand in the shapes, and there the tensors' own sizes are read off.  A size the tensors do not hold is 1 (what an IA3 layer takes in, say),
a stride, padding or dilation is the default, and a transposed linear layer looks like a linear one: none of it matters to the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft_ref.arrays import Array
from peft_ref.contracts import WeightMethod, declared
from peft_ref.errors import ConfigError, PeftRefError
from peft_ref.layers import Conv, Embedding, Layer, Linear

INPUT, OUTPUT, KERNEL = 1_000_003, 1_000_033, (1_000_037, 1_000_039, 1_000_081)
PROBES: tuple[Layer, ...] = (
    Linear(in_features=INPUT, out_features=OUTPUT),
    Embedding(num_embeddings=INPUT, embedding_dim=OUTPUT),
    *(Conv(in_channels=INPUT, out_channels=OUTPUT, kernel_size=KERNEL[:n]) for n in (1, 2, 3)),
)


def infer_layer(method: WeightMethod[Any], tensors: Mapping[str, Array], where: str) -> Layer:
    """The layer on which `method` has parameters like `tensors`, or the nearest to it, whose `unpack` then says what is wrong."""
    sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if _has_its_axes(method, sizes) and (measured := method.measured(sizes)):
        return measured
    best: tuple[int, Layer] | None = None
    for probe in PROBES:
        if probe.kind not in method.kinds:
            continue
        try:
            shapes = {spec.key: spec.stored_shape for spec in method.spec(probe)}
        except PeftRefError:
            continue
        fitting = {key: shape for key, shape in shapes.items() if key in tensors and len(tensors[key].shape) == len(shape)}
        score = 2 * len(fitting) - len(shapes.keys() ^ tensors.keys())
        if fitting and (best is None or score > best[0]):
            best = score, _measured(probe, fitting, tensors)
    if best is None:
        came = ", ".join(f"{key} {tuple(t.shape)}" for key, t in sorted(tensors.items()))
        raise ConfigError(
            f"{type(method).__name__} at {where!r}: {came} fit no kind of layer that can be told.\n  Pass `layers`, the model's."
        )
    return best[1]


def _has_its_axes(method: WeightMethod[Any], sizes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether every tensor has as many axes as the method gives it on some layer: `measured` reads sizes, and counts on their number."""
    axes: dict[str, set[int]] = {}
    for shape, keys in declared(method.params_type).values():
        for key in keys:
            letters = (key.stored or shape).split()
            kernel = (1, 2, 3) if any(letter.startswith("*") for letter in letters) else (1,)
            axes.setdefault(key.key, set()).update(len(letters) - 1 + n for n in kernel)
    return all(len(size) in axes.get(key, {len(size)}) for key, size in sizes.items())


def _measured(probe: Layer, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Array]) -> Layer:
    sizes: dict[int, int] = {}
    for key, shape in shapes.items():
        for mark, size in zip(shape, tensors[key].shape, strict=True):
            sizes.setdefault(mark, size)
    n_in, out = sizes.get(INPUT, 1), sizes.get(OUTPUT, 1)
    if isinstance(probe, Linear):
        return Linear(in_features=n_in, out_features=out)
    if isinstance(probe, Embedding):
        return Embedding(num_embeddings=n_in, embedding_dim=out)
    conv = Conv(in_channels=n_in, out_channels=out, kernel_size=tuple(sizes.get(mark, 1) for mark in probe.kernel_size))
    return replace(conv, groups=_groups(conv, shapes, tensors))


def _groups(conv: Conv, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Array]) -> int:
    """A grouped convolution shows where a parameter's second axis is a whole part of what it would be without groups."""
    for key, shape in shapes.items():
        if len(shape) < 2:
            continue
        expected, size = shape[1], int(tensors[key].shape[1])
        if expected not in (INPUT, OUTPUT) and 0 < size < expected and expected % size == 0:
            groups = expected // size
            if conv.in_channels % groups == 0 and conv.out_channels % groups == 0:
                return groups
    return 1
