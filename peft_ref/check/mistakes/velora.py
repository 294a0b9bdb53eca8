"""VeLoRA: what is asked, and what ports get wrong: almost all of it is A's gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from peft_ref import stack
from peft_ref.check import lora_family as lora
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Draw, Files, Fresh, Start
from peft_ref.check.case import Answer, Case, NDArray
from peft_ref.check.distributions import Law, constant
from peft_ref.check.lora_starts import laws as lora_laws
from peft_ref.check.lora_variants import FAMILY, variants
from peft_ref.check.mistake import Mistake, Replay, Suite, only
from peft_ref.check.oracle import answer, pose
from peft_ref.layers import Layer
from peft_ref.methods import lora as plain
from peft_ref.stack import Adapter

GROUPS = {"velora_config": {"num_groups": 2, "scale": 1.5, "init_type": "random"}}
PLAIN = {**lora.PLAIN, **GROUPS}
AVERAGED = {**lora.PLAIN, "velora_config": {"num_groups": 2, "scale": 1.5, "init_type": "batch_average"}}

Kept = Callable[[NDArray, NDArray, int, float], NDArray]  # what becomes of rows (r, in): given rows, v, num_groups and scale


def kept(rows: NDArray, v: NDArray, groups: int, scale: float) -> NDArray:
    out = np.zeros((rows.shape[0], groups * len(v)))
    for g in range(groups):
        piece = rows[:, g * len(v) : (g + 1) * len(v)]
        end = piece.shape[1]
        out[:, g * len(v) : g * len(v) + len(v)] = scale * (piece @ v[:end])[:, None] * v
    return out[:, : rows.shape[1]]


def without_rest(rows: NDArray, v: NDArray, groups: int, scale: float) -> NDArray:
    out, whole = kept(rows, v, groups, scale), rows.shape[1] // len(v) * len(v)
    out[:, whole:] = 0
    return out


def dealt(rows: NDArray, v: NDArray, groups: int, scale: float) -> NDArray:
    """A piece is every num_groups-th feature."""
    width = groups * len(v)
    order = np.arange(width).reshape(len(v), groups).T.reshape(-1)
    padded = np.pad(rows, ((0, 0), (0, width - rows.shape[1])))[:, order]
    out = np.zeros((rows.shape[0], width))
    out[:, order] = kept(padded, v, groups, scale)
    return out[:, : rows.shape[1]]


def _plain_gradients(case: Case, change: Callable[[Any, Any], Any] = lambda method, p: p.A) -> tuple[Any, ...]:
    """LoRA's own, with another A."""
    p = pose(case)
    twins = []
    for a in p.adapters:
        m: Any = a.method
        twin = plain.LoRA(r=m.r, lora_alpha=m.lora_alpha, use_rslora=m.use_rslora)
        twins.append(Adapter(twin, plain.Params(A=change(m, a.params), B=a.params.B), a.dropout))
    return stack.vjp(p.layer, p.W, p.b, twins, p.x, p.dy).params


def with_kept(keep: Kept) -> Replay:
    def backward(case: Case) -> Answer:
        right, p = answer(case), pose(case)
        for i, (a, g) in enumerate(zip(p.adapters, _plain_gradients(case), strict=True)):
            config = a.method.velora_config  # type: ignore[attr-defined]  # every method of this suite has one
            right = {**right, f"{i}.lora_A.weight": keep(g.A, a.params.v, config.num_groups, config.scale)}
        return right

    return only(backward=backward)


def _B_from_kept(case: Case) -> Answer:
    right = answer(case)
    grads = _plain_gradients(case, lambda m, p: kept(p.A, p.v, m.velora_config.num_groups, m.velora_config.scale))
    for i, g in enumerate(grads):
        right = {**right, f"{i}.lora_B.weight": g.B}
    return right


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    if config["velora_config"]["init_type"] == "random":
        return lora_laws(config, layer)
    return {**lora_laws(config, layer), "lora_velora_embed": constant(0.0, "init-projection: before the first batch it is zero")}


def identity(case: Case, layer: Layer, draw: Draw, dtype: str) -> str:
    if case.adapters[0].config["velora_config"]["init_type"] == "random" and abs(np.linalg.norm(draw["lora_velora_embed"]) - 1) > 0.02:
        return "init-projection-length: lora_velora_embed must have length 1"
    return ""


def _unit(rows: NDArray, v: NDArray, groups: int, scale: float) -> NDArray:
    return kept(rows, v / math.sqrt(float(v @ v)), groups, scale)


SUITE = Suite(
    variants=variants("VELORA-C1", GROUPS, ("linear", "transposed_linear"), rounded={}),
    fresh=Fresh(clause="VELORA-C11", starts={"default": Start(AVERAGED), "random": Start(PLAIN)}, laws=laws, identity=identity),
    files=Files(
        configs_clause="VELORA-C13",
        keys_clause="VELORA-C14",
        configs={"plain": PLAIN, "defaults": {"r": 4, "lora_alpha": 6, "velora_config": {}}},
    ),
    mistakes=(
        *(m for m in FAMILY if m.name != "dropout-on-base-too"),  # whose author's autograd would keep x whole
        Mistake(
            name="grad-A-whole-input",
            clause="VELORA-C7",
            sentence="A's gradient is the derivative: the input was kept whole",
            replay=with_kept(lambda rows, v, groups, scale: rows),
        ),
        Mistake(
            name="grad-A-velora-scale-missing",
            clause="VELORA-C7",
            sentence="velora_config's scale is not in A's gradient",
            replay=with_kept(lambda rows, v, groups, scale: kept(rows, v, groups, 1.0)),
        ),
        Mistake(
            name="grad-A-velora-scale-twice",
            clause="VELORA-C7",
            sentence="velora_config's scale multiplies both what is kept and what is made of it",
            replay=with_kept(lambda rows, v, groups, scale: kept(rows, v, groups, scale * scale)),
        ),
        Mistake(
            name="projection-normalised-again",
            clause="VELORA-C9",
            sentence="the stored projection is divided by its length before use",
            replay=with_kept(_unit),
        ),
        Mistake(
            name="groups-dealt",
            clause="VELORA-C8",
            sentence="a group is every num_groups-th feature instead of neighbouring ones",
            replay=with_kept(dealt),
        ),
        Mistake(
            name="last-group-dropped",
            clause="VELORA-C8",
            sentence="a last group that is not full is left out instead of filled up with zeros",
            replay=with_kept(without_rest),
        ),
        Mistake(
            name="grad-B-from-kept",
            clause="VELORA-C10",
            sentence="B's gradient is computed from the compressed input too",
            replay=only(backward=_B_from_kept),
        ),
        shared.only_first_adapter("VELORA-C4"),
    ),
)
