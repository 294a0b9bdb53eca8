"""What is asked about a method, and the numbers of a case. The rules are those that known mistakes taught:

    alpha != r, and alpha/r, alpha/sqrt(r), alpha and 1/r pairwise different; the rank a perfect square, so that rsLoRA stays exact
    every dimension different, none 1; a bias present; no factor zero, no parameter at its initial value
    absolute expected values, never a round trip: `unmerge` gets a weight that is not what `merge` gives

Three kinds of numbers: "small" (+-1, +-2: exact even in bfloat16), "dyadic" (multiples of 1/2 up to 3/2: exact in float16 and up),
"rounded" (a scale like 5/3 and larger sizes: nothing is exact, a bound is needed). All inputs have at most 8 significant bits, so that
no format rounds them on the way in.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from peft_ref.check.case import LAYER_OPERATIONS, Case, CaseAdapter, NDArray, config_of
from peft_ref.contracts import WeightMethod
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.norms import Norm

Draw: TypeAlias = Callable[[np.random.Generator, tuple[int, ...]], NDArray]

RUN = ("forward", "backward")

LAYERS: dict[str, Layer] = {
    "linear": Linear(in_features=5, out_features=7),
    "linear-even": Linear(in_features=5, out_features=12),
    "linear-blocks": Linear(in_features=8, out_features=5),
    "embedding-blocks": Embedding(num_embeddings=9, embedding_dim=8),
    "conv2d-pointwise": Conv(in_channels=8, out_channels=5, kernel_size=(1, 1), stride=(2, 1), padding=(1, 2)),
    "transposed_linear": Linear(in_features=5, out_features=7, transposed=True),
    "embedding": Embedding(num_embeddings=9, embedding_dim=7),
    "conv1d": Conv(in_channels=5, out_channels=7, kernel_size=(3,), stride=(2,), padding=(1,)),
    "conv2d": Conv(in_channels=3, out_channels=5, kernel_size=(2, 4), stride=(2, 1), padding=(1, 2)),
    "conv2d-square": Conv(in_channels=3, out_channels=5, kernel_size=(2, 2), stride=(2, 2), padding=(1, 1)),
    "conv3d": Conv(in_channels=2, out_channels=3, kernel_size=(2, 1, 3), padding=(0, 1, 1)),
    "conv2d-groups": Conv(in_channels=6, out_channels=10, kernel_size=(3, 2), stride=(1, 2), groups=2),
    "conv1d-dilation": Conv(in_channels=3, out_channels=5, kernel_size=(2,), padding=(2,), dilation=(3,)),
    "linear-large": Linear(in_features=13, out_features=11),
    "linear-thirds": Linear(in_features=6, out_features=9),
    "linear-square": Linear(in_features=8, out_features=8),
    "linear-both": Linear(in_features=8, out_features=12),
    "transposed-both": Linear(in_features=8, out_features=12, transposed=True),
    "conv1d-both": Conv(in_channels=6, out_channels=10, kernel_size=(3,), stride=(2,), padding=(1,)),
    "conv2d-both": Conv(in_channels=6, out_channels=10, kernel_size=(2, 3), padding=(1, 0)),
    "layer-norm": Norm(features=6, eps=0.25),
    "rms-norm": Norm(features=6, eps=0.25, centred=False),
}
INPUTS: dict[str, tuple[int, ...]] = {
    "linear": (2, 3),
    "linear-even": (2, 3),
    "linear-blocks": (2, 3),
    "embedding-blocks": (2, 3),
    "conv2d-pointwise": (2, 5, 4),
    "transposed_linear": (2, 3),
    "embedding": (2, 3),
    "conv1d": (2, 8),
    "conv2d": (2, 6, 5),
    "conv2d-square": (2, 5, 4),
    "conv3d": (2, 3, 2, 4),
    "conv2d-groups": (2, 4, 5),
    "conv1d-dilation": (2, 7),
    "linear-large": (3, 2),
    "linear-thirds": (2, 3),
    "linear-square": (3,),
    "linear-both": (2, 3),
    "transposed-both": (2, 3),
    "conv1d-both": (2, 5),
    "conv2d-both": (2, 2, 4),
    "layer-norm": (2, 3),
    "rms-norm": (2, 3),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One configuration of a method, and where and how it is asked.

    `configs` has one entry per active adapter. `draws` replaces the draw of a parameter that must not be just any number (a magnitude).
    """

    name: str
    clause: str
    configs: tuple[Mapping[str, Any], ...]
    layers: tuple[str, ...] = ("linear",)
    operations: tuple[str, ...] = LAYER_OPERATIONS
    numbers: str = "dyadic"
    dropout: float = 0.0
    bias: bool = True
    rows: tuple[int, ...] | None = None  # the leading axes of x, where they are not the layer's usual ones; () for a single vector
    draws: Mapping[str, Draw] = field(default_factory=dict)
    # A frozen weight made to measure, given its matrix shape and the adapter's tensors.
    weight: Callable[[np.random.Generator, tuple[int, int], Mapping[str, NDArray]], NDArray] | None = None


def small(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return rng.choice([-2.0, -1.0, 1.0, 2.0], shape, p=[0.15, 0.35, 0.35, 0.15])


def dyadic(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return rng.choice([-1.5, -1.0, -0.5, 0.5, 1.0, 1.5], shape)


def rounded(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return np.asarray(rng.integers(17, 64, shape) * rng.choice([-1.0, 1.0], shape) / 32)


def gains(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """Positive numbers of the size of a row's norm, none of them the norm."""
    return rng.choice([1.25, 1.75, 2.5, 3.5, 4.5], shape)


NUMBERS: dict[str, Draw] = {"small": small, "dyadic": dyadic, "rounded": rounded}


def generator(name: str) -> np.random.Generator:
    """The generator of a case: its id is its seed, so a case never changes when another is added."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def make_case(name: str, variant: Variant, layer_name: str, layer: Layer, methods: list[WeightMethod[Any]], operation: str) -> Case:
    """The case of one variant on one layer. All operations of it share their numbers; only what they are asked differs."""
    where = f"{name}.{layer_name}.{variant.name}"
    rng, draw = generator(where), NUMBERS[variant.numbers]
    has_bias = variant.bias and layer.kind != "embedding"
    layer = layer.with_bias(has_bias)
    weight = draw(rng, layer.weight_shape)
    bias = draw(rng, (layer.shape[0],)) if has_bias else None
    x = _input(rng, draw, layer, INPUTS[layer_name] if variant.rows is None else variant.rows)
    adapters = []
    for method in methods:
        places = places_of(method, layer, rng)
        tensors = {s.key: variant.draws.get(s.field, draw)(rng, s.stored_shape) for s in method.spec(layer) if s.key not in places} | places
        dropout = (mask_of(rng, x.shape), variant.dropout) if variant.dropout else None
        adapters.append(CaseAdapter(config=config_of(method), tensors=tensors, dropout=dropout))
    if variant.weight is not None:
        weight = layer.unfold(variant.weight(rng, layer.shape, adapters[0].tensors))
    case = Case(
        id=f"{where}.{operation}",
        method=name,
        operation=operation,
        clause=variant.clause,
        layer=layer,
        weight=weight,
        bias=bias,
        adapters=tuple(adapters),
    )
    if operation in ("forward", "backward"):
        case = replace(case, x=x)
    if operation == "backward":
        out_shape = layer.apply(x, layer.fold(weight), None).shape
        case = replace(case, dy=draw(rng, out_shape))
    if operation == "unmerge":
        case = replace(case, merged_weight=draw(rng, layer.weight_shape))
        case = replace(case, merged_bias=draw(rng, (layer.shape[0],)) if has_bias else None)
    return case


def places_of(method: WeightMethod[Any], layer: Layer, rng: np.random.Generator) -> dict[str, NDArray]:
    """Integers that an adapter is saved with, of another seed than its configuration's: a port has to read them, not to draw them again."""
    words = {f.name for f in dataclasses.fields(method)}  # type: ignore[arg-type]  # every method is a dataclass
    if "random_seed" in words:
        method = replace(method, random_seed=int(rng.integers(2**31)))  # type: ignore[type-var]
    elif "projection_prng_key" in words and _whole(method, layer):
        method = replace(method, projection_prng_key=int(rng.integers(2**31)))  # type: ignore[type-var]
    return _whole(method, layer)


def _whole(method: WeightMethod[Any], layer: Layer) -> dict[str, NDArray]:
    return {k: v for k, v in method.untrained(layer).items() if v.dtype.kind in "iu"}


def _input(rng: np.random.Generator, draw: Draw, layer: Layer, shape: tuple[int, ...]) -> NDArray:
    if isinstance(layer, Embedding):
        return rng.integers(0, layer.num_embeddings, shape)
    if isinstance(layer, Conv):
        return draw(rng, (shape[0], layer.in_channels, *shape[1:]))
    return draw(rng, (*shape, layer.channels))


def mask_of(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """Zeros and ones, about half each, and never all alike."""
    mask = rng.integers(0, 2, shape)
    mask.reshape(-1)[:2] = (0, 1)
    return mask
