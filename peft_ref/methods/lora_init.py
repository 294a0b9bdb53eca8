"""How LoRA's factors start, and what several LoRA variants check alike.

    True          A uniform within 1/sqrt(fan in), B = 0; embedding: A = 0, B standard normal
    "gaussian"    A normal with deviation 1/r, B = 0; embedding: as True
    False         A, B and lora_bias's c uniform within 1/sqrt(their fan in); embedding: both standard normal: not the identity
    "orthogonal"  A and B from the odd and even rows of one random orthogonal matrix, so that B A = 0 with both non-zero
    "pissa"       s B A is the best rank-r part of W, which W loses          arXiv:2404.02948
    "olora"       B and A are the first r columns of Q and rows of R, W = Q R; W loses s B A

    "corda", "loftq", "eva", "lora_ga"   from data or a quantiser: functions of their own, in `corda_init.py` and its like

pissa and olora change the frozen weight, as do corda, loftq and lora_ga: an adapter trained from them belongs to the weight returned here.
For orthogonal, pissa and olora HF falls back to the default on an embedding and refuses a convolution.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np

from peft_ref.arrays import Array, namespace, thin_svd, to, zeros_like
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer
from peft_ref.ranges import positive, probability

NAMES = ("gaussian", "orthogonal", "pissa", "olora")
NEEDS_MATRIX = ("orthogonal", "pissa", "olora")
FROM_DATA = ("corda", "loftq", "eva", "lora_ga")


class _HasRank(Protocol):
    @property
    def r(self) -> int: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def init_lora_weights(self) -> bool | str: ...


class Factored(Protocol):
    """What a start from data asks of a method: LoRA, or DoRA, whose magnitudes come after (`dora.with_magnitudes`)."""

    @property
    def r(self) -> int: ...
    @property
    def scale(self) -> float: ...


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def check_rank(method: _HasRank) -> None:
    positive(method, "r")
    probability(method, "lora_dropout")
    init = method.init_lora_weights
    if not isinstance(init, bool) and init not in (*NAMES, *FROM_DATA):
        raise ConfigError(f"init_lora_weights={init!r} is not built here.\n  There are True, False, {', '.join(map(repr, NAMES))}.")
    if init == "orthogonal" and method.r % 2:
        raise ConfigError(f"init_lora_weights='orthogonal' needs an even rank, got r={method.r}.")


class _HasBias(_HasRank, Protocol):
    @property
    def lora_bias(self) -> bool: ...


def check_bias(method: _HasBias) -> None:
    if method.lora_bias and not isinstance(method.init_lora_weights, bool):
        raise ConfigError(
            f"lora_bias=True with init_lora_weights={method.init_lora_weights!r}: HF PEFT refuses the pair.\n"
            "  Use init_lora_weights=True or False, or lora_bias=False."
        )


def biased(method: _HasBias, params: Any, layer: Layer, W: Array, rng: np.random.Generator) -> Any:
    """Fresh parameters with lora_bias's c, where it is on."""
    return params._replace(c=initial_bias(layer, W, method.r, method.init_lora_weights, rng)) if method.lora_bias else params


def scaled(scale: float, c: Array | None) -> Array | None:
    """What c adds to the bias, and its own transpose."""
    return None if c is None else scale * c


def check_init(method: _HasRank, layer: Layer) -> None:
    if layer.kernel_size and method.init_lora_weights in NEEDS_MATRIX:
        raise UnsupportedLayerError(
            f"init_lora_weights={method.init_lora_weights!r} on a {layer.kind} layer: HF PEFT refuses it.\n  Use True, False or 'gaussian'."
        )
    largest = min(layer.shape)
    if layer.kind != "embedding" and method.init_lora_weights in ("pissa", "olora") and method.r > largest:
        raise UnsupportedLayerError(
            f"init_lora_weights={method.init_lora_weights!r} with r={method.r}: a weight {layer.shape} has only {largest} directions.\n"
            f"  HF PEFT makes factors of rank {largest} under a config that says r={method.r}. Use r <= {largest}."
        )
    if method.r % layer.groups:
        raise UnsupportedLayerError(f"r={method.r} on a convolution with groups={layer.groups}: the rank must be divisible by the groups.")


def initial_factors(layer: Layer, W: Array, r: int, scale: float, init: bool | str, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """A (r, fan in), B (out, r/groups) and the frozen weight, in W's library and dtype."""
    if init in FROM_DATA:
        raise ConfigError(
            f"init_lora_weights={init!r} is made of data, or by a quantiser, and of nothing that is known here.\n"
            f"  Call peft_ref.methods.{init}_init, and give what it returns as the module's start."
        )
    out, fan_in, mid = layer.shape[0], layer.fan_in, r // layer.groups

    def uniform(rows: int, columns: int) -> Array:
        bound = 1 / math.sqrt(columns)
        return to(rng.uniform(-bound, bound, (rows, columns)), W)

    def normal(rows: int, columns: int, deviation: float = 1.0) -> Array:
        return to(rng.normal(0.0, deviation, (rows, columns)), W)

    if layer.kind == "embedding":
        A = normal(r, fan_in) if init is False else zeros_like((r, fan_in), W)
        return A, normal(out, r), W
    if init == "orthogonal":
        return *_orthogonal(out, fan_in, r, rng, W), W
    if init == "pissa":
        return _pissa(W, r, scale)
    if init == "olora":
        return _olora(W, r, scale)
    A = normal(r, fan_in, 1 / r) if init == "gaussian" else uniform(r, fan_in)
    B = uniform(out, mid) if init is False else zeros_like((out, mid), W)
    return A, B, W


def initial_bias(layer: Layer, W: Array, r: int, init: bool | str, rng: np.random.Generator) -> Array:
    """c (out,), the bias of B: torch's default for a layer of r / groups inputs where nothing is to start as the identity."""
    bound = 1 / math.sqrt(r / layer.groups) if init is False else 0.0
    return to(rng.uniform(-bound, bound, (layer.shape[0],)), W)


def _orthogonal(out: int, fan_in: int, r: int, rng: np.random.Generator, like: Array) -> tuple[Array, Array]:
    Q, _ = np.linalg.qr(rng.normal(size=(r, r)))
    A = (rng.normal(size=(fan_in, r // 2)) @ Q[0::2]).T / 10
    B = rng.normal(size=(out, r // 2)) @ Q[1::2] / 10
    return to(A, like), to(B, like)


def _pissa(W: Array, r: int, scale: float) -> tuple[Array, Array, Array]:
    xp = namespace(W)
    U, S, Vh = thin_svd(W)
    root = xp.sqrt(S[:r] / scale)
    A = xp.expand_dims(root, axis=1) * Vh[:r, :]
    B = U[:, :r] * root
    return A, B, W - scale * (B @ A)


def _olora(W: Array, r: int, scale: float) -> tuple[Array, Array, Array]:
    Q, R = namespace(W).linalg.qr(W)
    A, B = R[:r, :], Q[:, :r]
    return A, B, W - scale * (B @ A)
