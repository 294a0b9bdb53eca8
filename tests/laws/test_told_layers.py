"""A layer that tensors tell has tensors of these sizes, and without any nothing is told."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from peft_ref.contracts import WeightMethod
from peft_ref.files.infer import infer_layer
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.methods import METHODS, GLoRA
from peft_ref.norms import Norm
from tests.methods import facts, made, takes


def shapes(method: WeightMethod[Any], layer: Layer) -> dict[str, tuple[int, ...]]:
    return {s.key: s.stored_shape for s in method.spec(layer) if s.saved}


def linear(n_in: int, out: int, **more: Any) -> Linear:
    return Linear(in_features=n_in, out_features=out, **more)


def conv(*kernel: int, bias: bool = False) -> Conv:
    return Conv(in_channels=3, out_channels=4, kernel_size=kernel, bias=bias)


@pytest.mark.parametrize("name", ["adamss", "bdlora", "c3a", "gralora", "ln_tuning", "loha_effective", "miss", "road"])
def test_without_a_tensor_nothing_is_told(name: str) -> None:
    assert made(name).measured({}) is None


LAYERS = [linear(6, 4), linear(4, 6), linear(4, 4), conv(1), conv(3), conv(1, 1), conv(3, 1), conv(1, 3), conv(2, 1, 1), conv(2, 3, 1)]


def settings() -> list[Any]:
    methods = [(label, m) for name in METHODS.weights for label, m in facts(name).settings.items()]
    return [pytest.param(m, layer, id=f"{label}-{n}") for label, m in methods for n, layer in enumerate(LAYERS) if takes(m, layer)]


@pytest.mark.parametrize(("method", "layer"), settings())
def test_what_a_method_tells_has_the_tensors_that_told_it(method: WeightMethod[Any], layer: Layer) -> None:
    given = shapes(method, layer)
    told = method.measured(given)
    assert told is None or shapes(method, told) == given


BOTH = {"adamss_newB": (2, 5), "adamss_B.0": (3, 1), "adamss_B.1": (4, 1), "adamss_A.0": (1, 2), "adamss_A.1": (1, 2)}
CORE = {"hada_t1": (2, 2, 3, 3), "hada_w1_a": (2, 8), "hada_w1_b": (2, 6)}
TOLD: list[tuple[str, dict[str, Any], dict[str, tuple[int, ...]], Layer | None]] = [
    ("adamss", {}, BOTH, linear(4, 7)),
    ("adamss", {}, {key: shape for key, shape in BOTH.items() if key != "adamss_newB"}, None),
    ("adamss", {}, {"adamss_newB": (2, 5)}, None),
    ("c3a", {}, {"c3a_kernel": (2, 3, 4)}, linear(12, 8)),
    ("loha_effective", {}, CORE, Conv(in_channels=6, out_channels=8, kernel_size=(3, 3))),
    *(("loha_effective", {}, {key: CORE[key] for key in CORE if key != gone}, None) for gone in CORE),
    ("loha_effective", {}, {**CORE, "hada_t1": (2, 2, 3, 1)}, Conv(in_channels=6, out_channels=8, kernel_size=(3,))),
    ("loha_effective", {}, {**CORE, "hada_t1": (2, 2, 1, 3)}, Conv(in_channels=6, out_channels=8, kernel_size=(1, 3))),
    ("miss", {"r": 2}, {"miss_block": (2, 5)}, linear(2, 5)),
    ("road", {"variant": "road_1", "group_size": 2}, {"road_theta": (3,), "road_alpha": (3,)}, linear(1, 6)),
    ("road", {"variant": "road_2", "group_size": 2}, {"road_theta": (6,), "road_alpha": (6,)}, linear(1, 6)),
    ("road", {"variant": "road_4", "group_size": 2}, {"road_theta": (12,), "road_alpha": (12,)}, linear(1, 6)),
    *(
        (
            "trainable_tokens",
            {"token_indices": tokens},
            {"trainable_tokens_delta": (len(tokens), 5)},
            Embedding(num_embeddings=rows, embedding_dim=5),
        )
        for tokens, rows in (((), 1), ((0,), 1), ((3, 1), 4))
    ),
    ("trainable_tokens", {}, {}, None),
    ("trainable_tokens", {}, {"trainable_tokens_delta": (5,)}, None),
]


@pytest.mark.parametrize(("name", "options", "given", "layer"), TOLD)
def test_the_smallest_layer_is_told(name: str, options: dict[str, Any], given: dict[str, tuple[int, ...]], layer: Layer | None) -> None:
    assert made(name, **options).measured(given) == layer


AB, C, DE = ("lora", "vector", "constant", "none"), ("lora", "vector", "none"), ("vector", "constant", "none")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out", "n_in"), [(3, 4), (4, 3), (2, 2)])
def test_glora_tells_a_layer_in_each_of_its_forms(out: int, n_in: int, bias: bool) -> None:
    """Not whether there is a bias where none of the five needs one, nor `out` where the weight and the bias have one number each: 1."""
    for ab, c, de in product(AB, C, DE):
        method = GLoRA(r=2, config_A_B=ab, config_C=c, config_D_E=de)
        needed = bias and (c, de) != ("none", "none")
        unsaid = bias and (ab, de) == ("constant", "constant")
        assert method.measured(shapes(method, linear(n_in, out, bias=bias))) == linear(n_in, 1 if unsaid else out, bias=needed)


OF_ROWS = {"A.Xd": (3, 2), "A.zeros": (3, 4), "A.X": (3, 1), "D.zeros": (3,), "D.X": (3,)}
OF_COLUMNS = {"A.Xu": (2, 4), "A.zeros": (3, 4), "C.Xd": (4, 2), "C.X": (4, 1), "C.zeros": (4, 1)}


@pytest.mark.parametrize(("c", "de", "bias"), [("none", "none", False), ("lora", "none", True), ("none", "vector", True)])
def test_of_two_tensors_of_glora_one_tells_the_rows_and_one_the_columns(c: str, de: str, bias: bool) -> None:
    """Whether the layer has a bias, the configuration says of what is not there, and zeros where it says something else deny it."""
    method = GLoRA(config_C=c, config_D_E=de)
    for row, column in product(OF_ROWS, OF_COLUMNS):
        given = {f"glora_{row}": OF_ROWS[row], f"glora_{column}": OF_COLUMNS[column]}
        denied = (c == "none" or column == "C.zeros") and (de == "none" or row == "D.zeros")
        assert method.measured(given) == linear(4, 3, bias=bias and not denied), (row, column)
    for only in (OF_ROWS, OF_COLUMNS):
        for key in only.keys() - {"A.zeros"}:
            assert method.measured({f"glora_{key}": only[key]}) is None


@pytest.mark.parametrize(
    "layer",
    [
        *(Norm(features=5, bias=bias) for bias in (True, False)),
        *(linear(3, 4, bias=bias) for bias in (True, False)),
        *(linear(3, 3, bias=bias) for bias in (True, False)),
        linear(3, 4, transposed=True, bias=True),
        *(conv(*kernel, bias=bias) for bias in (True, False) for kernel in ((2,), (2, 1), (1, 2, 3))),
    ],
)
def test_layers_stored_whole_are_told_whole(layer: Layer) -> None:
    method = METHODS.weights["ln_tuning"]()
    assert method.measured(shapes(method, layer)) == layer


@pytest.mark.parametrize("axes", [0, 6])
def test_of_no_axes_or_too_many_no_layer_is_told(axes: int) -> None:
    assert METHODS.weights["ln_tuning"]().measured({"ln_tuning_layers.weight": (2,) * axes}) is None


def test_what_tells_nothing_is_asked_of_every_kind_of_layer() -> None:
    """So that the laws above are about what a reader of files does."""
    import numpy as np

    tensors = {key: np.zeros(shape) for key, shape in BOTH.items()}
    assert infer_layer(made("adamss"), tensors, "block.0") == linear(4, 7)
