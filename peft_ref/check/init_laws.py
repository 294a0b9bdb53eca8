"""How fresh parameters must be distributed, judged from many draws, and the cases that ask for them.

A port draws with its own generator, so no number can be compared. What can: which parameters are exactly zero or one, within which bounds
a uniform draw stays and how it fills them, the deviation of a normal draw, and, where a start is computed from the weight, the identities
that survive the free choice of signs. The laws are written down here apart from the code that draws, from the catalogue of what
HF PEFT 0.21.2 does. `prompt_starts` has those of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from peft_ref.check.attending_text import attention_laws, attention_shapes
from peft_ref.check.case import Case, CaseAdapter, NDArray, build_method, build_prompt, config_of, decode
from peft_ref.check.distributions import Law, constant, normal, uniform
from peft_ref.check.prompt_starts import DRAWS, prompt_laws
from peft_ref.check.tolerance import PRECISION
from peft_ref.check.variants import LAYERS, dyadic, generator
from peft_ref.layers import Layer
from peft_ref.methods import METHODS

Draw: TypeAlias = dict[str, NDArray]


def laws(case: Case) -> dict[str, Law]:
    """The law of every key of a fresh adapter, where its numbers are drawn or constant."""
    if case.method in METHODS.prompts:
        return prompt_laws(case)
    if case.method in METHODS.attention:
        return attention_laws(case)
    config, layer = case.adapters[0].config, case.layer
    assert layer is not None
    if case.method == "hra":
        drawn = config["r"] // 2 if config["init_weights"] and config["r"] % 2 == 0 else config["r"]
        return {"hra_u": uniform(1 / math.sqrt(drawn))}
    if case.method == "ia3":
        return {"ia3_l": constant(1.0, "ia3-init-not-one")}
    if case.method == "loha":
        into, of_r = uniform(1 / math.sqrt(layer.shape[1])), uniform(1 / math.sqrt(config["r"]))
        return {"hada_w1_a": of_r, "hada_w1_b": into, "hada_w2_a": of_r, "hada_w2_b": constant(0.0, "init-not-identity")}
    if case.method == "oft":
        key = "oft_embedding_R.weight" if layer.kind == "embedding" else "oft_R.weight"
        return {key: constant(0.0, "init-not-identity") if config["init_weights"] else normal(0.1)}
    if case.method == "road":
        if config["init_weights"]:
            return {"road_theta": constant(0.0, "init-not-identity"), "road_alpha": constant(1.0, "init-not-identity")}
        return {"road_theta": normal(0.5), "road_alpha": normal(0.5, mean=1.0)}
    init = config["init_lora_weights"]
    if case.method == "adalora":
        if init is False:
            return {key: normal(1.0) for key in ("lora_A", "lora_E", "lora_B")}
        return {"lora_A": normal(0.02), "lora_E": constant(0.0, "init-E-random"), "lora_B": normal(0.02)}
    of_r = uniform(1 / math.sqrt(config["r"] // layer.groups))
    bias = {"lora_B.bias": of_r if init is False else constant(0.0, "init-bias-random")} if config.get("lora_bias") else {}
    if layer.kind == "embedding":
        zero = constant(0.0, "embedding-init-swapped: on an embedding A starts at zero and B at random")
        return {"lora_embedding_A": normal(1.0) if init is False else zero, "lora_embedding_B": normal(1.0)}
    into = uniform(1 / math.sqrt(layer.fan_in))
    B = of_r if init is False else constant(0.0, "init-B-random")
    A = normal(1 / config["r"]) if init == "gaussian" else into
    return {} if init in ("pissa", "olora", "orthogonal") else {"lora_A.weight": A, "lora_B.weight": B, **bias}


def grade_init(case: Case, answer: Mapping[str, Any], dtype: str) -> str:
    """What is wrong with a port's fresh adapters; an empty string if nothing is."""
    draws = answer.get("draws")
    if not isinstance(draws, list) or not draws:
        return f'the answer must hold "draws", a list of {case.question["draws"]} objects of tensors'
    specs = shapes_of(case)
    read: list[Draw] = []
    for draw in draws:
        arrays = {k: np.asarray(decode(v), dtype=np.float64) for k, v in draw.items() if k != "weight"}
        if arrays.keys() != specs.keys():
            return f"a draw has the keys {sorted(arrays)}, expected {sorted(specs)}"
        for key, array in arrays.items():
            if array.shape != specs[key]:
                return f"{key} is {array.shape}, expected {specs[key]}"
        if "weight" in draw:
            arrays["weight"] = np.asarray(decode(draw["weight"]), dtype=np.float64)
        read.append(arrays)
    for key, law in laws(case).items():
        if problem := law.problem(np.stack([d[key] for d in read]), dtype):
            return f"{key}: {problem}"
    return "" if case.layer is None else next((p for d in read if (p := _identity(case, case.layer, d, dtype))), "")


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a fresh adapter has, by its key."""
    config = case.adapters[0].config
    if case.method in METHODS.attention:
        return attention_shapes(case)
    if case.layer is None:
        return build_prompt(case.method, config).shapes()
    return {s.key: s.stored_shape for s in build_method(case.method, config).spec(case.layer)}


def _identity(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """The identities of one draw: those of starts computed from the weight, and DoRA's magnitude."""
    config = case.adapters[0].config
    if case.method == "hra" and config["init_weights"] and config["r"] % 2 == 0:
        paired = np.array_equal(draw["hra_u"][:, ::2], draw["hra_u"][:, 1::2])
        return "" if paired else "init-not-in-pairs: with r even every second column of hra_u must repeat the one before it"
    computed = config.get("init_lora_weights") in ("orthogonal", "pissa", "olora") and layer.kind != "embedding"
    if not computed and case.method != "dora":
        return ""
    assert case.weight is not None
    W = layer.fold(case.weight)
    A, B = (draw[k].reshape(draw[k].shape[0], -1) for k in _factor_keys(layer))
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    # Factors are rounded once to the port's format, and the products of them perhaps once per term; a decomposition is computed in float32
    # at least, there is none in a narrower format.
    u = (config["r"] + 4) * 2.0 ** -PRECISION[dtype]
    solver = 200 * 2.0 ** -max(PRECISION[dtype], PRECISION["float32"]) * float(np.linalg.norm(W))
    product, size = scale * (B @ A), scale * (np.abs(B) @ np.abs(A))
    init = config["init_lora_weights"]
    if init == "orthogonal":
        if np.any(np.abs(product) > u * size + solver):
            return "init-orthogonal: B A is not zero"
        return "" if np.any(A) and np.any(B) else "init-orthogonal: a factor is zero; both must be random with B A = 0"
    if init in ("pissa", "olora"):
        if (problem := _taken_from_weight(init, W, A, B, scale, u, solver)) != "":
            return problem
        if "weight" not in draw:
            return f"init-{init}-base-kept: the answer has no weight; {init} takes s B A out of the frozen weight"
        if np.any(np.abs(layer.fold(draw["weight"]) - (W - product)) > u * (np.abs(W) + size) + solver):
            return f"init-{init}-base-kept: the frozen weight must become W - s B A"
    if case.method == "dora":
        base = layer.fold(draw["weight"]) if "weight" in draw else W
        want = np.linalg.norm(base + product, axis=1)
        rounding = (W.shape[1] + 8) * 2.0 ** -PRECISION[dtype] * np.linalg.norm(np.abs(base) + size, axis=1)
        if np.any(np.abs(draw["lora_magnitude_vector"].reshape(-1) - want) > rounding):
            return "init-magnitude: lora_magnitude_vector must start at the row norms of W + s B A"
    return ""


def _taken_from_weight(init: str, W: NDArray, A: NDArray, B: NDArray, scale: float, u: float, solver: float) -> str:
    r = A.shape[0]
    product, size = scale * (B @ A), scale * (np.abs(B) @ np.abs(A))
    if init == "pissa":
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        if np.any(np.abs(product - (U[:, :r] * S[:r]) @ Vh[:r]) > u * size + solver):
            return "init-pissa: s B A is not the best rank-r part of W"
        if np.any(np.abs(scale * (A @ A.T) - np.diag(S[:r])) > u * scale * (np.abs(A) @ np.abs(A.T)) + solver):
            return "init-pissa: the singular values are not shared evenly: A A^T must be diag(S) / s"
        return ""
    Q, R = np.linalg.qr(W)
    if np.any(np.abs(product - scale * (Q[:, :r] @ R[:r])) > u * size + solver):
        return "init-olora: B A is not made of the first r columns of Q and rows of R"
    return (
        ""
        if np.all(np.abs(B.T @ B - np.eye(r)) <= u * (np.abs(B.T) @ np.abs(B)) + solver)
        else "init-olora: the columns of B are not orthonormal"
    )


def _factor_keys(layer: Layer) -> tuple[str, str]:
    return ("lora_embedding_A", "lora_embedding_B") if layer.kind == "embedding" else ("lora_A.weight", "lora_B.weight")


LORA_INITS: tuple[Mapping[str, Any], ...] = (
    {},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": False},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
)
ASKED: dict[str, tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]] = {
    "lora": (
        *(({"r": 4, "lora_alpha": 6, **c}, ("linear",)) for c in LORA_INITS),
        ({"r": 4, "lora_alpha": 6}, ("transposed_linear", "embedding", "conv2d", "conv2d-groups")),
        ({"r": 4, "lora_alpha": 6, "lora_bias": True}, ("linear",)),
        ({"r": 4, "lora_alpha": 6, "lora_bias": True, "init_lora_weights": False}, ("linear", "conv2d-groups")),
    ),
    "adalora": (
        ({"init_r": 4, "target_r": 2, "total_step": 10}, ("linear", "transposed_linear", "conv2d")),
        ({"init_r": 4, "target_r": 2, "total_step": 10, "init_lora_weights": False}, ("linear",)),
    ),
    "dora": (({"r": 4, "lora_alpha": 6}, ("linear", "embedding", "conv1d")),),
    "loha": (({"r": 4, "alpha": 6}, ("linear", "conv2d")),),
    "hra": (
        ({"r": 4}, ("linear", "conv2d-square")),
        ({"r": 3}, ("linear",)),
        ({"r": 4, "init_weights": False}, ("linear",)),
        ({"r": 4, "apply_GS": True}, ("linear",)),
    ),
    "oft": (
        ({"oft_block_size": 4}, ("linear-blocks", "embedding-blocks", "conv2d-pointwise")),
        ({"oft_block_size": 4, "init_weights": False}, ("linear-blocks",)),
    ),
    "road": (
        *(({"variant": f"road_{n}", "group_size": 4}, ("linear-even",)) for n in (1, 2, 4)),
        ({"group_size": 4, "init_weights": False}, ("linear-even",)),
    ),
    "ia3": (({"is_feedforward": False}, ("linear", "conv2d")), ({"is_feedforward": True}, ("linear",))),
}


NAMED_BY_CONFIG = ("hra", "oft", "road")  # whose starts differ by all of their configuration


def init_cases(name: str, clause: str) -> tuple[Case, ...]:
    """The cases that ask a method for fresh adapters."""
    cases = []
    for config, layers in ASKED[name]:
        for layer_name in layers:
            layer, method = LAYERS[layer_name], build_method(name, config)
            init = str(config.get("init_lora_weights", "default")).lower() + ("-bias" if config.get("lora_bias") else "")
            init += "-feedforward" if config.get("is_feedforward") else ""
            init += "".join(f"-{key}-{value}".lower() for key, value in config.items() if name in NAMED_BY_CONFIG)
            computed = config.get("init_lora_weights") in ("pissa", "olora")
            where = f"{name}.{layer_name}.init-{init}"
            case = Case(
                id=f"{where}.init",
                method=name,
                operation="init",
                clause=clause,
                layer=layer,
                weight=dyadic(generator(where), layer.weight_shape),
                bias=None if layer.kind == "embedding" else dyadic(generator(where + "b"), (layer.shape[0],)),
                adapters=(CaseAdapter(config=config_of(method), tensors={}),),
                question={"draws": 1 if computed else DRAWS},
            )
            cases.append(replace(case))
    return tuple(cases)
