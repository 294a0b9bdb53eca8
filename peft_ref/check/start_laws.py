"""How fresh parameters must be distributed, one function a method, and what is asked of it: `init_laws` looks here.

Written down apart from the code that draws, from the catalogue of what HF PEFT 0.21.2 does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from peft_ref.check.case import build_method
from peft_ref.check.distributions import Law, constant, normal, uniform
from peft_ref.layers import Layer

Config: TypeAlias = Mapping[str, Any]
ZERO = "init-not-identity"


def hira(config: Config, layer: Layer) -> dict[str, Law]:
    init = config["init_weights"]
    if layer.kind == "embedding":
        zero = constant(0.0, "embedding-init-swapped: on an embedding A starts at zero and B at random")
        return {"hira_embedding_A": normal(1.0) if init is False else zero, "hira_embedding_B": normal(1.0)}
    if init is False:
        return {"hira_A": normal(1.0), "hira_B": normal(1.0)}
    drawn = normal(1 / config["r"]) if init == "gaussian" and not layer.kernel_size else uniform(1 / math.sqrt(layer.shape[1]))
    return {"hira_A": drawn, "hira_B": constant(0.0, ZERO)}


def miss(config: Config, layer: Layer) -> dict[str, Law]:
    """Only the plain method has another start than zeros; `init_weights` of the two others says which they are."""
    drawn = uniform(1 / math.sqrt(layer.shape[0]))
    return {"miss_block": drawn if config["init_weights"] is False else constant(0.0, ZERO)}


def lokr(config: Config, layer: Layer) -> dict[str, Law]:
    """Everything uniform within 1 / sqrt(numbers of a row), but for the one that starts at zero."""
    method = build_method("lokr", config)
    first, second = ("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_b")
    zeros: tuple[str, ...] = {True: first, False: (), "lycoris": second}[config["init_weights"]]
    found = {}
    for s in method.spec(layer):
        found[s.key] = constant(0.0, ZERO) if s.key in zeros else uniform(1 / math.sqrt(math.prod(s.stored_shape[1:])))
    return found


def gralora(config: Config, layer: Layer) -> dict[str, Law]:
    (_, n_in), k, r, h = layer.shape, config["gralora_k"], config["r"], config["hybrid_r"]
    drawn = config["init_weights"] is False
    found = {"gralora_A": uniform(1 / math.sqrt(n_in // k)), "gralora_B": uniform(1 / math.sqrt(r)) if drawn else constant(0.0, ZERO)}
    if h:
        found["gralora_A_general.weight"] = uniform(1 / math.sqrt(n_in))
        found["gralora_B_general.weight"] = uniform(1 / math.sqrt(h)) if drawn else constant(0.0, ZERO)
    return found


LAWS: dict[str, Callable[[Config, Layer], dict[str, Law]]] = {
    "gralora": gralora,
    "hira": hira,
    "lokr": lokr,
    "miss": miss,
    "miss_bat": miss,
    "miss_mini": miss,
}
ASKED: dict[str, tuple[tuple[Config, tuple[str, ...]], ...]] = {
    "lokr": (
        ({"r": 2, "alpha": 3, "decompose_factor": 2}, ("linear-blocks", "conv2d-blocks")),
        ({"r": 2, "decompose_factor": 2, "init_weights": "lycoris"}, ("linear-blocks",)),
        ({"r": 2, "decompose_factor": 2, "init_weights": False}, ("linear-blocks",)),
        ({"r": 2, "decompose_factor": 6, "decompose_both": True}, ("linear-blocks",)),
        ({"r": 2, "use_effective_conv2d": True}, ("conv1d-blocks",)),
    ),
    "gralora": (
        ({"r": 4, "alpha": 6}, ("linear-blocks", "transposed-blocks")),
        ({"r": 4, "alpha": 6, "init_weights": False, "hybrid_r": 2}, ("linear-blocks",)),
        ({"r": 4, "alpha": 6, "hybrid_r": 2}, ("linear-blocks",)),
    ),
    "miss": (({"r": 4}, ("linear",)), ({"r": 4, "init_weights": False}, ("linear",))),
    "miss_bat": (({"r": 4}, ("linear-blocks",)),),
    "miss_mini": (({"r": 4, "mini_r": 3}, ("linear-blocks",)),),
    "hira": (
        ({"r": 4}, ("linear", "transposed_linear", "embedding", "conv2d")),
        ({"r": 4, "init_weights": "gaussian"}, ("linear", "conv1d")),
        ({"r": 4, "init_weights": False}, ("linear", "embedding")),
    ),
}
