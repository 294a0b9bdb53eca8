"""How fresh adapters of LoRA and DoRA start: the laws of what is drawn, and the identities of what is computed from the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from peft_ref.check.asked import Config, Draw
from peft_ref.check.case import Case, NDArray
from peft_ref.check.distributions import Law, constant, normal, uniform
from peft_ref.check.tolerance import PRECISION
from peft_ref.layers import Embedding, Layer, Linear

WITH_TABLE: Mapping[str, Layer] = {
    "model.layers.0.self_attn.v_proj": Linear(in_features=5, out_features=7),
    "model.layers.1.mlp.down_proj": Linear(in_features=7, out_features=5),
    "model.embed_tokens": Embedding(num_embeddings=9, embedding_dim=7),
}


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    init = config["init_lora_weights"]
    of_r = uniform(1 / math.sqrt(config["r"] // layer.groups))
    bias = {"lora_B.bias": of_r if init is False else constant(0.0, "init-bias-random")} if config.get("lora_bias") else {}
    if layer.kind == "embedding":
        zero = constant(0.0, "embedding-init-swapped: on an embedding A starts at zero and B at random")
        return {"lora_embedding_A": normal(1.0) if init is False else zero, "lora_embedding_B": normal(1.0)}
    into = uniform(1 / math.sqrt(layer.fan_in))
    B = of_r if init is False else constant(0.0, "init-B-random")
    A = normal(1 / config["r"]) if init == "gaussian" else into
    return {} if init in ("pissa", "olora", "orthogonal") else {"lora_A.weight": A, "lora_B.weight": B, **bias}


def identity(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """The identities of one draw: those of starts computed from the weight, and DoRA's magnitude."""
    config = case.adapters[0].config
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
