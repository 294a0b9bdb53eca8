"""BD-LoRA: LoRA with one factor block-diagonal, so that a layer that is split over devices needs no exchange within its adapter.

    W' = W + s B A      s = alpha / r,  or alpha / sqrt(r) with use_rslora

    A (r, in)  =  diag(A_1 ... A_n),  stored one under the other (r, in/n),  on modules of target_modules_bd_a
    B (out, r) =  diag(B_1 ... B_n),  stored one under the other (out, r/n),  on modules of target_modules_bd_b

n is nblocks. For a gradient G of W' the blocks of s B^T G and of s G A^T are the gradients: what lies between them is dropped.
A fresh B is zero.

Paper   none in PEFT 0.21.2's page; made for serving many adapters
HF      peft.LoraConfig(use_bdlora=BdLoraConfig(...)). A block-diagonal A is uniform within sqrt(6 n / in): kaiming_uniform_ with a = 0
        where LoRA's A has a = sqrt 5. A module of neither list is LoRA's with match_strict=False and refused with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, NamedTuple, Self, final

import numpy as np

from peft_ref.arrays import Array, column, device, namespace, tile, tile_vjp, to, zeros_like
from peft_ref.contracts import Factors, Key, LowRank, Start
from peft_ref.errors import ConfigError, UnsupportedLayerError
from peft_ref.layers import Layer, Linear
from peft_ref.methods.lora_init import biased, check_bias, check_init, check_rank, initial_factors, scaled, scaling
from peft_ref.methods.submap import as_submap
from peft_ref.ranges import one_of, positive

KINDS = frozenset({"linear", "transposed_linear"})


class Params(NamedTuple):
    A: Annotated[Array, "r reads", Key("lora_A.weight", kinds=KINDS)]
    B: Annotated[Array, "out writes", Key("lora_B.weight", kinds=KINDS)]
    c: Annotated[Array | None, "out", Key("lora_B.bias", kinds=KINDS, when="biased")] = None


@dataclass(frozen=True, kw_only=True)
class BdLoraConfig:
    target_modules_bd_a: tuple[str, ...] | None = None
    target_modules_bd_b: tuple[str, ...] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        a, b = self.target_modules_bd_a or (), self.target_modules_bd_b or ()
        if both := sorted(set(a) & set(b)):
            raise ConfigError(f"{both[0]!r} is in target_modules_bd_a and in target_modules_bd_b (HF PEFT refuses it too).")
        positive(self, "nblocks")

    def diagonal_of(self, module_name: str) -> str:
        """Which factor is block-diagonal on a module: "A", "B", or "" for neither. A pattern may stand anywhere in the name."""
        a = any(pattern in module_name for pattern in self.target_modules_bd_a or ())
        b = any(pattern in module_name for pattern in self.target_modules_bd_b or ())
        if a and b:
            raise ConfigError(f"use_bdlora: {module_name!r} matches target_modules_bd_a and target_modules_bd_b (HF PEFT refuses it too).")
        if self.match_strict and not a and not b:
            raise ConfigError(
                f"use_bdlora: {module_name!r} matches neither target_modules_bd_a nor target_modules_bd_b (HF PEFT refuses it too).\n"
                "  With match_strict=false it is plain LoRA."
            )
        return "A" if a else "B" if b else ""


@final
@dataclass(frozen=True, kw_only=True)
class BDLoRA(LowRank[Params]):
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    use_bdlora: BdLoraConfig = field(default_factory=BdLoraConfig)
    diagonal: str = ""  # of one module, as `use_bdlora` says; no key of adapter_config.json

    peft_type: ClassVar[str] = "LORA"
    flag: ClassVar[str | None] = "use_bdlora"
    flag_value: ClassVar[bool | str | type] = BdLoraConfig
    tuner_prefix: ClassVar[str] = "lora_"
    kinds: ClassVar[frozenset[str]] = KINDS
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "lora_dropout"

    def __post_init__(self) -> None:
        check_rank(self)
        check_bias(self)
        object.__setattr__(self, "use_bdlora", as_submap(BdLoraConfig, "use_bdlora", self.use_bdlora))
        one_of(self, "diagonal", "", "A", "B")  # '' where neither factor is block-diagonal

    @property
    def scale(self) -> float:
        return scaling(self.r, self.lora_alpha, self.use_rslora)

    def on_module(self, name: str) -> Self:
        return replace(self, diagonal=self.use_bdlora.diagonal_of(name))

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
        A, B = shapes.get("lora_A.weight", ()), shapes.get("lora_B.weight", ())
        return Linear(in_features=A[1] * self.blocks("A"), out_features=B[0]) if len(A) == len(B) == 2 else None

    def blocks(self, factor: str) -> int:
        """Of how many blocks a factor is made."""
        return self.use_bdlora.nblocks if factor == self.diagonal else 1

    def dims(self, layer: Layer) -> dict[str, int]:
        return {
            "r": self.r,
            "reads": layer.shape[1] // self.blocks("A"),
            "writes": self.r // self.blocks("B"),
            "biased": int(self.lora_bias and self.diagonal != "B"),
        }

    def check_geometry(self, layer: Layer) -> None:
        check_init(self, layer)
        n, size = self.use_bdlora.nblocks, layer.shape[1] if self.diagonal == "A" else layer.shape[0]
        if self.diagonal and (self.r % n or size % n):
            raise UnsupportedLayerError(
                f"BD-LoRA: {self.diagonal} of r={self.r} and {size} cannot be cut into nblocks={n} (HF PEFT refuses it too).\n"
                "  Both must be divisible by it."
            )
        if self.diagonal and layer.kind == "transposed_linear":
            raise UnsupportedLayerError(
                f"BD-LoRA on a transposed_linear layer with a block-diagonal {self.diagonal}: HF PEFT raises there.\n"
                "  Name it in neither list, with match_strict=false."
            )

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        A, B, W = initial_factors(layer, W, self.r, self.scale, self.init_lora_weights, rng)
        if self.diagonal == "A":
            n_in = layer.shape[1] // self.blocks("A")
            bound = math.sqrt(6 / n_in)
            A = to(rng.uniform(-bound, bound, (self.r, n_in)), W)
        if self.diagonal == "B":
            B = zeros_like((layer.shape[0], self.r // self.blocks("B")), W)
        p = Params(A, B)
        return Start(p if self.diagonal == "B" else biased(self, p, layer, W, rng), W)

    def factors(self, p: Params) -> Factors:
        return Factors(self.scale * spread_out(p.B, self.blocks("B")), spread_out(p.A, self.blocks("A")), scaled(self.scale, p.c))

    def factors_vjp(self, p: Params, d: Factors) -> Params:
        return Params(A=collected(d.A, self.blocks("A")), B=self.scale * collected(d.B, self.blocks("B")), c=scaled(self.scale, d.b))


def spread_out(V: Array, n: int) -> Array:
    """`V` (rows, columns), n blocks one under the other, as a block-diagonal matrix (rows, n columns)."""
    wide = tile(V, (V.shape[0], n * V.shape[1]))
    return namespace(V).where(_within(wide, n), wide, 0 * wide)


def collected(d: Array, n: int) -> Array:
    """The gradient of `spread_out`: the blocks of d (rows, n columns), one under the other."""
    return tile_vjp(namespace(d).where(_within(d, n), d, 0 * d), (d.shape[0], d.shape[1] // n))


def _within(V: Array, n: int) -> Array:
    """Where the blocks of V are."""
    xp, (rows, columns) = namespace(V), V.shape
    down, along = (xp.arange(size, device=device(V)) // (size // n) for size in (rows, columns))
    return column(down) == xp.expand_dims(along, axis=0)
