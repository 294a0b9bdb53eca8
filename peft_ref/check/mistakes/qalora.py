"""QA-LoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import lora_family as lora
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.distributions import Law, uniform
from peft_ref.check.lora_starts import laws as lora_laws
from peft_ref.check.lora_variants import FAMILY, variants
from peft_ref.check.mistake import Mistake, Replay, Suite, gradients_times
from peft_ref.layers import Layer, Linear

GROUPS = {"qalora_group_size": 2}
PLAIN = {**lora.PLAIN, **GROUPS}


def read(A: Array, size: int, weight: float) -> Array:
    """A's columns, each for `size` neighbouring inputs."""
    return weight * np.concatenate([A[:, j : j + 1] for j in range(A.shape[1]) for _ in range(size)], axis=1)


def dealt(A: Array, size: int, weight: float) -> Array:
    """A's columns, one input each in turn."""
    return weight * np.concatenate([A] * size, axis=1)


def first_of_group(A: Array, size: int, weight: float) -> Array:
    columns = [A[:, j : j + 1] if k == 0 else 0 * A[:, j : j + 1] for j in range(A.shape[1]) for k in range(size)]
    return weight * size * np.concatenate(columns, axis=1)


def with_reading(weight: Callable[[int, int], float], reading: Callable[[Array, int, float], Array] = read) -> Replay:
    """Another P, given the number of groups and their size."""

    def delta(layer: Layer, method: Any, p: Any, W0: Array) -> Array:
        size = method.qalora_group_size
        return method.scale * (p.B @ reading(p.A, size, weight(p.A.shape[1], size)))

    return shared.other_delta(delta)


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    groups = layer.shape[1] // config["qalora_group_size"]
    return {**lora_laws(config, layer), "lora_A.weight": uniform(groups**-0.5)}


SUITE = Suite(
    variants=variants("QALORA-C1", GROUPS, ("linear-both", "linear-blocks"), rounded={"qalora_group_size": 1}),
    fresh=Fresh(clause="QALORA-C8", starts={"default": Start(PLAIN, ("linear-both", "linear-blocks"))}, laws=laws),
    files=Files(
        configs_clause="QALORA-C10",
        keys_clause="QALORA-C11",
        configs={"plain": {**PLAIN, "use_qalora": True}, "size-missing": {"r": 4, "use_qalora": True}},
        saved_on={
            "model.layers.0.self_attn.v_proj": Linear(in_features=6, out_features=8),
            "model.layers.1.mlp.down_proj": Linear(in_features=8, out_features=6),
        },
    ),
    mistakes=(
        *FAMILY,
        Mistake(
            name="groups-summed",
            clause="QALORA-C2",
            sentence="a group's inputs are summed, as in the paper, where HF averages them and multiplies by the number of groups",
            replay=with_reading(lambda groups, size: 1.0),
        ),
        Mistake(
            name="groups-averaged",
            clause="QALORA-C2",
            sentence="a group's inputs are averaged, and not multiplied by the number of groups",
            replay=with_reading(lambda groups, size: 1 / size),
        ),
        Mistake(
            name="mean-forgotten",
            clause="QALORA-C2",
            sentence="a group's inputs are summed instead of averaged, and then multiplied by the number of groups",
            replay=with_reading(lambda groups, size: float(groups)),
        ),
        Mistake(
            name="groups-dealt",
            clause="QALORA-C1",
            sentence="a group is every n-th input instead of neighbouring ones",
            replay=with_reading(lambda groups, size: groups / size, dealt),
        ),
        Mistake(
            name="first-of-group",
            clause="QALORA-C1",
            sentence="of each group only the first input is read",
            replay=with_reading(lambda groups, size: groups / size, first_of_group),
        ),
        Mistake(
            name="grad-A-pooling-missing",
            clause="QALORA-C6",
            sentence="the gradient of A lacks the factor in / g^2 of its inputs",
            replay=gradients_times(lambda config: config["qalora_group_size"] ** 2 / 8, "_A"),
        ),
        shared.only_first_adapter("QALORA-C4"),
    ),
)
