"""MiCA: what is asked, and what ports get wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import lora_family as lora
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Case
from peft_ref.check.distributions import Law, constant
from peft_ref.check.lora_starts import WITH_TABLE
from peft_ref.check.lora_variants import FAMILY, OF_ONE_FACTOR, variants
from peft_ref.check.mistake import Mistake, Suite, as_if_tensors
from peft_ref.check.tolerance import PRECISION
from peft_ref.layers import Layer

KINDS = ("linear", "transposed_linear", "embedding")


def directions(W: Array, r: int, largest: bool) -> Array:
    U = np.linalg.svd(np.asarray(W, dtype=np.float64), full_matrices=False)[0]
    return U[:, :r] if largest else U[:, U.shape[1] - r :]


def computed(largest: bool) -> Any:
    """B worked out from the frozen weight."""
    return shared.other_delta(lambda layer, method, p, W0: method.scale * (directions(W0, method.r, largest) @ p.A))


def _least(W: Array, r: int) -> Array:
    U = directions(W, r, largest=False)
    return U @ U.T


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    key = "lora_embedding_A" if layer.kind == "embedding" else "lora_A.weight"
    return {key: constant(0.0, "init-A-random: A starts at zero, and B is what is not")}


def identity(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    """B's columns are orthonormal and span the least r directions. HF works them out in float32."""
    assert case.weight is not None
    W, r = layer.fold(case.weight), case.adapters[0].config["r"]
    B = draw["lora_embedding_B" if layer.kind == "embedding" else "lora_B.weight"]
    want, allowed = directions(W, r, largest=False), 400 * 2.0 ** -PRECISION["float32"] + 8 * r * 2.0 ** -PRECISION[dtype]
    if np.any(np.abs(B.T @ B - np.eye(r)) > allowed):
        return "init-B-not-orthonormal: B's columns are singular vectors, of length 1 and at right angles"
    if np.any(np.abs(B @ B.T - want @ want.T) > allowed):
        return "init-B-other-directions: B's columns must be the left singular vectors of the smallest singular values"
    return ""


SUITE = Suite(
    variants=variants("MICA-C1", {}, KINDS, rounded={}),
    fresh=Fresh(clause="MICA-C8", starts={"default": Start(lora.PLAIN, KINDS, draws=2)}, laws=laws, identity=identity),
    files=Files(
        configs_clause="MICA-C10",
        keys_clause="MICA-C11",
        configs={
            "plain": {"r": 4, "lora_alpha": 6, "init_lora_weights": "mica"},
            "alpha-pattern": {"r": 4, "init_lora_weights": "mica", "alpha_pattern": {"q_proj": 20}},
        },
        saved_on=WITH_TABLE,
    ),
    mistakes=(
        *(m for m in FAMILY if m.name not in OF_ONE_FACTOR),
        Mistake(
            name="B-from-weight",
            clause="MICA-C2",
            sentence="B is worked out from the frozen weight again, where the stored one counts, whose signs may be others",
            replay=computed(largest=False),
        ),
        Mistake(
            name="B-from-largest",
            clause="MICA-C2",
            sentence="B is worked out from the frozen weight, as the directions of the largest singular values",
            replay=computed(largest=True),
        ),
        Mistake(
            name="B-reversed",
            clause="MICA-C3",
            sentence="B's columns are in the other order, the smallest singular value first",
            replay=as_if_tensors(lambda key, v, config: v[:, ::-1] if "_B" in key else v),
        ),
        Mistake(
            name="B-projected",
            clause="MICA-C1",
            sentence="what A reads is projected on the frozen weight's least directions before B acts",
            replay=shared.other_delta(lambda layer, method, p, W0: method.scale * (_least(W0, method.r) @ (p.B @ p.A))),
        ),
        shared.only_first_adapter("MICA-C5"),
    ),
)
