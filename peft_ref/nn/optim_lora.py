"""Optimisers that know LoRA's factors. Parameters are adapters by module, {module: Params}, each with A (r, in) and B (out, r).

    LoRA+        B, and whatever is a vector, moves with  ratio lr,  A with lr, both of an embedding with a rate of their own
    LoRA-FA      A stays.  B moves as AdamW moves it, given  g (A A^T + 1e-8)^-1 / s^2  for its gradient g, where s is the adapter's scale
    Riemannian   dA becomes  (B^T B + reg)^-1 dA,   dB becomes  dB (A A^T + reg)^-1;   then any optimiser

LoRA-FA's gradient of B is the one that makes s B A move most like the weight itself would. Its AdamW is that of transformers: eps is
added before the bias is corrected, and weight decay comes after the step:
    m, v as in peft_ref/nn/optim.py     p = p - lr sqrt(1 - b2^t) / (1 - b1^t)  m / (sqrt(v) + eps),   then  p = (1 - lr w) p

Papers  LoRA+ 2402.12354, LoRA-FA 2308.03303, Riemannian preconditioning 2402.02347
HF      peft.optimizers. LoRA-FA multiplies g and the inverse in bfloat16 unless they are float64, and pairs tensors as they come: beside a
        lora_bias or a magnitude the pairs are wrong. It takes the scale of the layer; the arguments r and lora_alpha are read by nobody.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from peft_ref.arrays import Array, eye_like, namespace, right_divide
from peft_ref.errors import ConfigError
from peft_ref.nn.optim import SGD, AdamW, AdamWState, SGDState
from peft_ref.nn.tree import mapped

Adapters = Mapping[str, Any]  # parameters by module, or their gradients


@final
@dataclass(frozen=True, kw_only=True)
class LoRAPlus:
    ratio: float
    optimiser: AdamW | SGD = field(default_factory=lambda: AdamW(weight_decay=0.0))
    embedding_lr: float = 1e-6
    embeddings: frozenset[str] = frozenset()  # the modules that are embeddings

    def __post_init__(self) -> None:
        if self.ratio <= 0:
            raise ConfigError(f"ratio={self.ratio}: B's learning rate is that many times A's; it must be positive, and is best above 1.")

    def init(self, params: Adapters) -> AdamWState | SGDState:
        return self.optimiser.init(params)

    def update(self, state: Any, params: Adapters, grads: Adapters, lr: float) -> tuple[Any, Adapters]:
        """The state and the parameters after one step: one step of every group, none of which sees the others' gradients."""
        free = dataclasses.replace(self.optimiser, weight_decay=0.0)
        groups = {"A": (self.optimiser, lr), "B": (self.optimiser, self.ratio * lr), "bias": (free, self.ratio * lr)}
        after: Any = state
        for group, (optimiser, rate) in {**groups, "embedding": (self.optimiser, self.embedding_lr)}.items():
            own = {module: self._of_group(group, module, params[module], g) for module, g in grads.items()}
            after, params = optimiser.update(after._replace(step=state.step), params, own, rate)
        return after, params

    def _of_group(self, group: str, module: str, params: Any, grads: Any) -> Any:
        """The gradients of one group at one module, None for the others'."""
        groups = [self._group(module, name, p) for name, p in zip(params._fields, params, strict=True)]
        return type(grads)(*(g if own == group else None for own, g in zip(groups, grads, strict=True)))

    def _group(self, module: str, name: str, p: Array | None) -> str:
        if module in self.embeddings:
            return "embedding"
        if name == "c":  # lora_bias: no decay
            return "bias"
        return "B" if name == "B" or (p is not None and p.ndim == 1) else "A"


@final
@dataclass(frozen=True, kw_only=True)
class LoRAFA:
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0

    def init(self, params: Adapters) -> AdamWState:
        return AdamW(betas=self.betas).init(params)

    def update(
        self, state: AdamWState, params: Adapters, grads: Adapters, lr: float, scales: Mapping[str, float]
    ) -> tuple[AdamWState, dict[str, Any]]:
        """The state and the parameters after one step; `scales` are the adapters' at their modules. Only B moves."""
        step, (b1, b2) = state.step + 1, self.betas
        own = {module: _only_B(g, _projected(params[module], g, scales[module])) for module, g in grads.items()}
        m = mapped(lambda m, g: m if g is None else b1 * m + (1 - b1) * g, state.m, own)
        v = mapped(lambda v, g: v if g is None else b2 * v + (1 - b2) * (g * g), state.v, own)
        rate = lr * math.sqrt(1 - b2**step) / (1 - b1**step)

        def moved(p: Array, g: Array | None, m: Array, v: Array) -> Array:
            return p if g is None else (1 - lr * self.weight_decay) * (p - rate * (m / (namespace(v).sqrt(v) + self.eps)))

        return AdamWState(step, m, v), dict(mapped(moved, params, own, m, v))


def preconditioned(params: Adapters, grads: Adapters, reg: float = 1e-2, embeddings: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The Riemannian gradients, of A and B alone; those of an embedding and of what else there is stay."""
    return {module: g if module in embeddings else _preconditioned(params[module], g, reg) for module, g in grads.items()}


def _preconditioned(p: Any, g: Any, reg: float) -> Any:
    mT = namespace(p.A).matrix_transpose
    dA = None if g.A is None else mT(right_divide(mT(g.A), _gram(mT(p.B), reg)))
    dB = None if g.B is None else right_divide(g.B, _gram(p.A, reg))
    return g._replace(A=dA, B=dB)


def _projected(p: Any, g: Any, scale: float) -> Array | None:
    return None if g.B is None else right_divide(g.B, _gram(p.A, 1e-8)) / scale**2


def _only_B(g: Any, dB: Array | None) -> Any:
    return type(g)(*(dB if name == "B" else None for name in g._fields))


def _gram(V: Array, damping: float) -> Array:
    """V V^T + damping, symmetric."""
    return V @ namespace(V).matrix_transpose(V) + damping * eye_like(V.shape[0], V)
