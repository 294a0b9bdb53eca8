"""Where a method stops: the last layer that it takes, and beside it, one step on, the first that it refuses.

A step is the smallest that there is (one more group, input or row, one word of the kind), so a bound that is off by one shows. Which
layers these are is PEFT's behaviour, as the method's page tells it; the laws only ever see layers that are taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peft_ref.contracts import WeightMethod
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.methods import METHODS
from peft_ref.methods.bdlora import BdLoraConfig
from tests.methods import made, small

POINT, SQUARE = Conv(in_channels=4, out_channels=4, kernel_size=(1, 1)), Conv(in_channels=4, out_channels=4, kernel_size=(2, 2))
LINE = Conv(in_channels=4, out_channels=4, kernel_size=(2,))
TWO_GROUPS = {"groups": 2}
BLOCKS = BdLoraConfig(nblocks=2, match_strict=False)


def linear(out: int, n_in: int, transposed: bool = False) -> Linear:
    return Linear(in_features=n_in, out_features=out, transposed=transposed)


def table(rows: int, size: int = 2) -> Embedding:
    return Embedding(num_embeddings=rows, embedding_dim=size)


def steps(name: str, layer: Layer, *changes: dict[str, Any], **options: Any) -> list[tuple[WeightMethod[Any], Layer, Layer]]:
    method = made(name, **options) if options else small(name)
    return [(method, layer, replace(layer, **change)) for change in changes]  # type: ignore[type-var]


def between(name: str, taken: Layer, *refused: Layer, **options: Any) -> list[tuple[WeightMethod[Any], Layer, Layer]]:
    return [(made(name, **options), taken, layer) for layer in refused]


UNEVEN = ({"dilation": (2, 1)}, {"dilation": (1, 2)}, {"stride": (1, 2)}, {"stride": (2, 1)}, {"padding": (0, 1)}, {"padding": (1, 0)})
WIDE = ("vera", "pvera", "randlora")
STARTS = [
    row
    for name in ("lora", "dora")
    for row in (
        *between(name, linear(3, 2), linear(3, 1), linear(1, 3), r=2, init_lora_weights="pissa"),
        *between(name, linear(2, 3), linear(3, 1), r=2, init_lora_weights="olora"),
        *(between(name, linear(4, 4), LINE, SQUARE, r=2, init_lora_weights=start)[0] for start in ("pissa", "olora", "orthogonal")),
    )
]
BOUNDS = [
    *STARTS,
    *steps("adalora", SQUARE, TWO_GROUPS),
    *steps("dora", SQUARE, TWO_GROUPS),
    *steps("hira", SQUARE, TWO_GROUPS),
    *steps("lora", replace(SQUARE, groups=2), {"groups": 4}, r=2),
    *between("lora", linear(3, 3), table(3, 3), r=2, lora_bias=True),
    *steps("oft", POINT, TWO_GROUPS, {"kernel_size": (1, 2)}, {"kernel_size": (2, 1)}, {"dilation": (2, 1)}, {"dilation": (1, 2)}),
    *steps("boft", SQUARE, TWO_GROUPS, {"kernel_size": (2, 1)}, {"kernel_size": (1, 2)}, *UNEVEN, boft_block_size=2),
    *steps("hra", SQUARE, TWO_GROUPS, {"kernel_size": (2, 1)}, {"kernel_size": (1, 2)}, *UNEVEN, r=2),
    *between("hra", linear(5, 2), linear(5, 1), r=2, apply_GS=True),
    *between("boft", linear(5, 4), linear(5, 3), linear(5, 5), boft_block_size=2),
    *between("adamss", linear(4, 2), linear(4, 1), r=4, num_subspaces=1, subspace_rank=3),
    *between("bdlora", linear(3, 4), linear(4, 3), linear(3, 4, transposed=True), r=4, use_bdlora=BLOCKS, diagonal="A"),
    *between("bdlora", linear(4, 3), linear(3, 4), linear(4, 3, transposed=True), r=4, use_bdlora=BLOCKS, diagonal="B"),
    *between("c3a", linear(2, 4), linear(3, 4), linear(2, 3), block_size=2),
    *between("gralora", linear(2, 4), linear(3, 4), linear(2, 3), gralora_k=2, r=2),
    *between("kasa", linear(3, 3), linear(2, 3), linear(3, 2), r=2),
    *between("mica", linear(2, 3), linear(1, 3), linear(3, 1), r=2),
    *between("psoft", linear(2, 3), linear(1, 3), linear(3, 1), r=2),
    *between("miss_bat", linear(2, 4), linear(3, 4), linear(2, 3), r=2),
    *between("miss_mini", linear(2, 3), linear(3, 2), r=2, mini_r=2),
    *between("qalora", linear(3, 4), linear(4, 3), qalora_group_size=2, r=2),
    *between("road", linear(4, 3), linear(3, 4), group_size=2),
    *between("vblora", linear(2, 4), linear(3, 4), linear(2, 3), vector_length=2, num_vectors=5),
    *between("fourierft", linear(2, 3), linear(5, 1), linear(1, 5), n_frequency=6),
    *between("waveft", linear(2, 3), linear(5, 1), linear(1, 5), n_frequency=6),
    *between("trainable_tokens", table(4), table(3), linear(3, 5), token_indices=(1, 3)),
    *between("trainable_tokens", linear(4, 2), linear(3, 5), token_indices=(1, 3)),
    *between("osf", linear(2, 2), linear(1, 5), linear(5, 1)),
    *between("supertuning", linear(2, 2), linear(3, 1), linear(1, 3), sparsity=0.75),
    *between("miss", linear(3, 2), linear(3, 1), r=2),
    *between("shira", linear(2, 2), linear(2, 1), linear(1, 2), r=1),
    *between("shira", linear(3, 6), linear(3, 5), linear(2, 6), r=2),
    *(row for name in WIDE for row in between(name, linear(4, 3), linear(5, 3), linear(4, 4), r=2, widest_in=3, widest_out=4)),
]


@pytest.mark.parametrize(("method", "taken", "refused"), BOUNDS)
def test_a_method_takes_up_to_its_bound_and_refuses_what_is_beyond(method: WeightMethod[Any], taken: Layer, refused: Layer) -> None:
    method.check_layer(taken, "block.0")
    with pytest.raises(UnsupportedLayerError):
        method.check_layer(refused, "block.0")


def test_every_method_with_a_bound_is_here() -> None:
    bounded = {name for name, cls in METHODS.weights.items() if "check_geometry" in vars(cls)}
    here = {name for method, _, _ in BOUNDS for name, cls in METHODS.weights.items() if cls is type(method)}
    assert bounded - here - {"velora", "monteclora"} == set()
