"""What is asked about one method beside its layers: how a fresh adapter starts, what its configuration means, under which keys it is saved.

Every method's module in `mistakes/` says its own; `init_laws`, `text` and `text_cases` make questions of it and grade the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from peft_ref.check.case import Case, NDArray
from peft_ref.check.distributions import Law
from peft_ref.layers import Layer, Linear

Config: TypeAlias = Mapping[str, Any]
Draw: TypeAlias = dict[str, NDArray]  # the tensors of one fresh adapter, and "weight" where drawing changed the frozen one

DRAWS = 48
ENDINGS = ("q_proj", "v_proj", "up_proj", "down_proj")


class Start(NamedTuple):
    """A configuration whose fresh adapters are asked, on these layers. One draw is enough where the weight alone decides the numbers."""

    config: Config
    layers: tuple[str, ...] = ("linear",)
    draws: int = DRAWS


def no_identity(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """Nothing is asked of a draw but that each tensor follows its law."""
    return ""


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """How fresh adapters are distributed, written down apart from the code that draws.

    `laws` gives the law of every key that is drawn or constant; `identity` says what is wrong within one draw (a start that is computed
    from the weight, numbers that repeat), an empty string if nothing is.
    """

    clause: str
    starts: Mapping[str, Start]
    laws: Callable[[Config, Layer], Mapping[str, Law]]
    identity: Callable[[Case, Layer, Draw, str], str] = no_identity


@dataclass(frozen=True, kw_only=True)
class Files:
    """What configuration files say, by name, and under which keys an adapter of the first of them is saved."""

    configs_clause: str
    keys_clause: str
    configs: Mapping[str, Config]
    told: Mapping[str, str] = field(default_factory=lambda: {"r": "r", "scaling": "scale"})  # of a module: word, attribute of its method
    modules: tuple[str, ...] = ENDINGS  # those that a configuration is asked about
    saved_on: Mapping[str, Layer] = field(
        default_factory=lambda: {
            "model.layers.0.self_attn.v_proj": Linear(in_features=5, out_features=7),
            "model.layers.1.mlp.down_proj": Linear(in_features=7, out_features=5),
        }
    )
