"""The frequencies of rotary positions, from config.json.

    default   f_i = theta^(-2 i / d),  i < d / 2
    linear    f_i / factor
    llama3    f_i where a wave of f_i fits often into the trained length, f_i / factor where it fits seldom, a blend in between

transformers 5 writes "rope_parameters" {rope_theta, rope_type, ...}; before, rope_theta stood alone and the rest was "rope_scaling".
Source for llama3: transformers.modeling_rope_utils, which follows Meta's release; no paper describes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from peft_ref.errors import ConfigError

TYPES = ("default", "linear", "llama3")


@final
@dataclass(frozen=True, kw_only=True)
class Rope:
    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 2048

    def __post_init__(self) -> None:
        if self.rope_type not in TYPES:
            raise ConfigError(f"rope_type={self.rope_type!r} is not built here.\n  There are {', '.join(TYPES)}.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Rope:
        given: dict[str, Any] = {**(config.get("rope_parameters") or config.get("rope_scaling") or {})}
        given.setdefault("rope_type", given.get("type", "default"))
        given.setdefault("rope_theta", config.get("rope_theta") or cls.rope_theta)
        trained = config.get("original_max_position_embeddings")  # beside the others it wins, as in HF
        trained = trained or given.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        given["original_max_position_embeddings"] = trained or cls.original_max_position_embeddings
        needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(given["rope_type"], ())
        if missing := [key for key in needed if key not in given]:
            raise ConfigError(f"rope_parameters of type {given['rope_type']!r} lack {', '.join(missing)}.")
        return cls(**{key: value for key, value in given.items() if key in cls.__dataclass_fields__})

    def frequencies(self, dim: int) -> tuple[float, ...]:
        """One per pair of the `dim` numbers of a head."""
        plain = (self.rope_theta ** (-i / dim) for i in range(0, dim, 2))
        scale = {"default": lambda f: f, "linear": lambda f: f / self.factor, "llama3": self._llama3}[self.rope_type]
        return tuple(scale(f) for f in plain)

    def _llama3(self, f: float) -> float:
        """How often the wave fits tells how much of f stays: all from high_freq_factor times on, nothing below low_freq_factor."""
        fits = self.original_max_position_embeddings * f / (2 * math.pi)
        kept = (fits - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(1.0, max(0.0, kept))
        return (1 - kept) * f / self.factor + kept * f
