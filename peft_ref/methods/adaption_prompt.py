"""AdaptionPrompt, LLaMA-Adapter: every token also attends to a learned prompt, in a softmax of its own behind a gate that starts at zero.

    k, v = k_proj(E), v_proj(E)        A = softmax(q k^T / sqrt(d))        added = g A v

    E (1, n, hidden)    g (1,)    q (batch, heads, T, d), after rotary positions    k, v (1, groups, n, d), not rotated

For a gradient D of `added`:   dg = sum D (A v)    dv = g A^T D    dZ = A (dA - sum(A dA)),  dA = g D v^T    dq = dZ k / sqrt(d)
dk = dZ^T q / sqrt(d),  summed over the batch and over the heads that share them;   dE = dk W_k + dv W_v.

Paper   Zhang et al. 2023, arXiv:2303.16199, eq. 5 to 8
HF      peft.AdaptionPromptConfig: E standard normal, g zero and used as it is (the paper's code takes tanh(g)), one gate for all heads
        (the code has one for each). The scale is 1 / sqrt(d) even where the model has another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple, final

import numpy as np

from peft_ref.arrays import Array, namespace, to
from peft_ref.attending import AddedGradients, AttentionMethod, shared_by_all
from peft_ref.attention import attention, attention_vjp
from peft_ref.contracts import Key
from peft_ref.errors import ConfigError
from peft_ref.ranges import positive


class Params(NamedTuple):
    E: Annotated[Array, "1 n hidden", Key("adaption_prompt")]
    g: Annotated[Array, "1", Key("adaption_gate")]


@final
@dataclass(frozen=True, kw_only=True)
class AdaptionPrompt(AttentionMethod[Params]):
    adapter_len: int | None = None  # n

    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    tuner_prefix: ClassVar[str] = "adaption_prompt_"
    params_type = Params

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "adapter_len")

    def dims(self) -> Mapping[str, int]:
        if self.adapter_len is None:
            raise ConfigError("adapter_len is not given, the length of the prompt (HF PEFT needs it too).\n  Give it.")
        return {"n": self.adapter_len}

    def init(self, hidden_size: int, like: Array, rng: np.random.Generator) -> Params:
        return Params(E=to(rng.normal(size=(1, self.dims()["n"], hidden_size)), like), g=to(np.zeros(1), like))

    def rows(self, p: Params) -> Array:
        return p.E

    def rows_vjp(self, p: Params, d: Array) -> Params:
        return Params(E=d, g=None)

    def added(self, p: Params, q: Array, k: Array, v: Array) -> Array:
        k, v = (shared_by_all(part, q.shape[0]) for part in (k, v))
        return p.g * attention(q, k, v, None, q.shape[-1] ** -0.5)

    def added_vjp(self, p: Params, q: Array, k: Array, v: Array, dy: Array) -> AddedGradients[Params]:
        xp = namespace(q)
        k, v = (shared_by_all(part, q.shape[0]) for part in (k, v))
        scale = q.shape[-1] ** -0.5
        dg = xp.reshape(xp.sum(dy * attention(q, k, v, None, scale)), (1,))
        d = attention_vjp(q, k, v, None, scale, p.g * dy)
        dk, dv = (xp.sum(part, axis=0, keepdims=True) for part in (d.k, d.v))
        return AddedGradients(Params(E=None, g=dg), d.q, dk, dv)
