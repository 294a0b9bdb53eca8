"""VeLoRA: LoRA that keeps of its input, for the backward pass, one number per group of features.

    W' = W + s B A      s = alpha / r,  or alpha / sqrt(r) with use_rslora

    A (r, in)    B (out, r)    v (width,) of length 1, not trained: width = in / num_groups, rounded up

The input is cut into num_groups pieces of that width, the last ones filled up with zeros. A piece z is kept as the number <z, v> and
taken for  scale <z, v> v  when A's gradient is computed. That is linear in the input, so for a gradient G of W':

    dA = s B^T G R,   R = scale diag(v v^T, ..., v v^T), cut to (in, in)       dB = s G A^T

dA is on purpose not the derivative; dB and dx are. A fresh B is zero.
v is the mean piece of the batch divided by its length (`projection`): before every training step with init_type "batch_average",
before the first alone with "batch_average_once"; with "random" it is drawn at the start and stays. In inference it is not read.

Paper   2024, arXiv:2405.17991
HF      peft.LoraConfig(velora_config=...), nn.Linear and Conv1D. v is a buffer, lora_velora_embed, saved with the adapter; a forward pass
        in training mode replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, as_rows, namespace, pad, to, zeros_like
from peft_ref.contracts import Factors, Key, LowRank, Start, WeightMap
from peft_ref.layers import Layer
from peft_ref.methods import lora
from peft_ref.methods.lora_init import biased, check_bias, check_init, check_rank, initial_factors, scaled, scaling
from peft_ref.methods.submap import as_submap
from peft_ref.ranges import one_of, positive

INIT_TYPES = ("batch_average", "batch_average_once", "random")


class Params(NamedTuple):
    A: Annotated[Array, "r in", Key("lora_A.weight", kinds=lora.LINEAR)]
    B: Annotated[Array, "out r", Key("lora_B.weight", kinds=lora.LINEAR)]
    v: Annotated[Array, "width", Key("lora_velora_embed", kinds=lora.LINEAR, trained=False)]
    c: Annotated[Array | None, "out", Key("lora_B.bias", kinds=lora.LINEAR, when="lora_bias")] = None


@dataclass(frozen=True, kw_only=True)
class VeloraConfig:
    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        positive(self, "num_groups", "scale")
        one_of(self, "init_type", *INIT_TYPES)


@final
@dataclass(frozen=True, kw_only=True)
class VeLoRA(LowRank[Params]):
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    velora_config: VeloraConfig = field(default_factory=VeloraConfig)

    peft_type: ClassVar[str] = "LORA"
    flag: ClassVar[str | None] = "velora_config"
    flag_value: ClassVar[bool | str | type] = VeloraConfig
    tuner_prefix: ClassVar[str] = "lora_"
    kinds: ClassVar[frozenset[str]] = lora.LINEAR
    params_type: ClassVar[type[tuple[Any, ...]]] = Params
    dropout: ClassVar[str | None] = "lora_dropout"

    def __post_init__(self) -> None:
        check_rank(self)
        check_bias(self)
        object.__setattr__(self, "velora_config", as_submap(VeloraConfig, "velora_config", self.velora_config))

    @property
    def scale(self) -> float:
        return scaling(self.r, self.lora_alpha, self.use_rslora)

    def dims(self, layer: Layer) -> dict[str, int]:
        return {"r": self.r, "width": -(-layer.shape[1] // self.velora_config.num_groups)}

    def check_geometry(self, layer: Layer) -> None:
        check_init(self, layer)

    def init(self, layer: Layer, W: Array, rng: np.random.Generator) -> Start[Params]:
        A, B, W = initial_factors(layer, W, self.r, self.scale, self.init_lora_weights, rng)
        width = self.dims(layer)["width"]
        if self.velora_config.init_type != "random":
            return Start(biased(self, Params(A, B, zeros_like((width,), W)), layer, W, rng), W)
        v = rng.normal(size=width)
        return Start(biased(self, Params(A, B, to(v / np.linalg.norm(v), W)), layer, W, rng), W)

    def projection(self, x: Array) -> Array:
        """v for the input x (..., in), dropout done: the mean piece, of length 1; where it is zero, all entries alike."""
        xp = namespace(x)
        mean = xp.mean(self._pieces(as_rows(x)), axis=(0, 1))
        norm = xp.sqrt(xp.sum(mean * mean))
        mean = xp.where(norm == 0, xp.ones_like(mean), mean)
        return mean / xp.sqrt(xp.sum(mean * mean))

    def factors(self, p: Params) -> Factors:
        return Factors(B=self.scale * p.B, A=p.A, b=scaled(self.scale, p.c))

    def factors_vjp(self, p: Params, d: Factors) -> Params:
        return self.to_params(A=self._kept(p.v, d.A), B=self.scale * d.B, c=scaled(self.scale, d.b))

    def differentiated(self, layer: Layer, p: Params, W0: Array) -> WeightMap[Params]:
        """A moves only along what is kept: R is symmetric, so its own transpose."""
        return lambda q, W, b: self.weight(layer, q._replace(A=p.A + self._kept(p.v, q.A - p.A)), W, b, W0)

    def _pieces(self, rows: Array) -> Array:
        """(rows, num_groups, width)"""
        groups, n_in = self.velora_config.num_groups, rows.shape[1]
        width = -(-n_in // groups)
        return namespace(rows).reshape(pad(rows, 1, 0, groups * width - n_in), (rows.shape[0], groups, width))

    def _kept(self, v: Array, rows: Array) -> Array:
        """`rows` (n, in) times R."""
        xp = namespace(rows)
        numbers = xp.sum(self._pieces(rows) * v, axis=2, keepdims=True)
        wide = xp.reshape(numbers * v, (rows.shape[0], self.velora_config.num_groups * v.shape[0]))
        return self.velora_config.scale * wide[:, : rows.shape[1]]
