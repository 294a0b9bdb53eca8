"""What is asked about AdaLoRA's penalty and its allocator, on small models.

In most traces every number is +-1 or +-2, both weights of the averages have two bits and all sizes are powers of two, so that means come
out: in float64 and float32 nothing rounds, and bits must match. `salt` is part of the seed of a trace's numbers. It was looked for until
in these two formats, at every allocation, no honest computation could drift so far that another triplet stays; a test says so. A tie is
made by giving two triplets of a module the same numbers, so that whatever is done to both their scores are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peft_ref.check.case import Case, NDArray, build_method, config_of
from peft_ref.check.training import KEYS
from peft_ref.check.variants import NUMBERS, generator

METHOD = "adalora"
Sizes = Mapping[str, tuple[int, int]]  # module -> in, out
POWERS: Sizes = {"layers.0.up_proj": (4, 8), "layers.0.down_proj": (16, 2)}
ODD: Sizes = {"layers.1.up_proj": (5, 7), "layers.1.down_proj": (9, 3)}
SMALL = {"init_r": 3, "target_r": 1, "beta1": 0.5, "beta2": 0.75}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One question to the allocator: steps `first` to `last` of a training with this configuration."""

    name: str
    clause: str
    config: Mapping[str, Any]
    first: int
    last: int
    salt: int
    sizes: Sizes = field(default_factory=lambda: POWERS)
    twins: tuple[tuple[str, int, int], ...] = ()  # module, and two of its triplets that are given the same numbers
    draw: str = "small"


TRACES = (
    Trace(name="plain", clause="ADALORA-C25", config={**SMALL, "total_step": 9}, first=1, last=5, salt=2596),
    Trace(
        name="warm-up",
        clause="ADALORA-C26",
        config={**SMALL, "total_step": 7, "tinit": 1, "tfinal": 2, "deltaT": 2},
        first=0,
        last=7,
        salt=5723,
    ),
    Trace(
        name="last-off-the-beat",
        clause="ADALORA-C26",
        config={**SMALL, "total_step": 6, "tfinal": 1, "deltaT": 3},
        first=1,
        last=6,
        salt=5219,
    ),
    Trace(
        name="last-alone",
        clause="ADALORA-C27",
        config={**SMALL, "total_step": 6, "tinit": 1, "tfinal": 2, "deltaT": 50},
        first=1,
        last=6,
        salt=4292,
    ),
    Trace(
        name="nothing-stays",
        clause="ADALORA-C24",
        config={**SMALL, "target_r": 0, "total_step": 5, "tfinal": 1, "deltaT": 2},
        first=1,
        last=5,
        salt=5911,
    ),
    Trace(name="nothing-goes", clause="ADALORA-C25", config={**SMALL, "target_r": 3, "total_step": 4}, first=1, last=3, salt=0),
    Trace(
        name="ties",
        clause="ADALORA-C25",
        config={**SMALL, "total_step": 5, "deltaT": 2},
        first=1,
        last=5,
        salt=5744,
        twins=(("layers.0.up_proj", 0, 2), ("layers.0.down_proj", 1, 2)),
    ),
    Trace(
        name="default-averages",
        clause="ADALORA-C22",
        config={"init_r": 4, "target_r": 2, "total_step": 8, "tinit": 2, "tfinal": 1, "deltaT": 2},
        first=1,
        last=8,
        salt=3173,
        sizes=ODD,
        draw="rounded",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """One question about the penalty. Factors that are `sized`, by module and key, are orthogonal: all numbers +- that size."""

    name: str
    clause: str
    config: Mapping[str, Any]
    sizes: Sizes
    draw: str = "dyadic"
    sized: Mapping[tuple[str, str], float] = field(default_factory=dict)


PENALTIES = (
    Penalty(name="plain", clause="ADALORA-C19", config={**SMALL, "init_r": 4, "total_step": 9, "orth_reg_weight": 0.75}, sizes=ODD),
    Penalty(
        name="three-modules",
        clause="ADALORA-C19",
        config={"init_r": 2, "target_r": 1, "total_step": 9, "orth_reg_weight": 0.3},
        sizes={**ODD, "layers.2.up_proj": (4, 6)},
        draw="rounded",
    ),
    # Rows of Hadamard matrices: A A^T is 1, B^T B is 2, A A^T and B^T B are 1/2 times the identity, and every norm is 0, 1 or 2.
    Penalty(
        name="orthogonal",
        clause="ADALORA-C20",
        config={**SMALL, "init_r": 4, "total_step": 9},
        sizes={"layers.0.up_proj": (16, 8), "layers.0.down_proj": (32, 8)},
        sized={
            ("layers.0.up_proj", KEYS.A): 1 / 4,
            ("layers.0.up_proj", KEYS.B): 1 / 2,
            ("layers.0.down_proj", KEYS.A): 1 / 8,
            ("layers.0.down_proj", KEYS.B): 1 / 4,
        },
    ),
)


def training_cases() -> tuple[Case, ...]:
    return (*map(_penalty_case, PENALTIES), *map(trace_case, TRACES))


def trace_case(trace: Trace) -> Case:
    config = _config(trace.config)
    rng = generator(f"{METHOD}.allocator.{trace.name}.{trace.salt}")
    steps = []
    for number in range(trace.first, trace.last + 1):
        drawn = [_tensors(rng, trace.draw, config["init_r"], trace.sizes) for _ in ("parameters", "gradients")]
        for tensors in drawn:
            for module, one, other in trace.twins:
                _make_twins(tensors[module], one, other)
        steps.append({"step": number, "parameters": drawn[0], "gradients": drawn[1]})
    return _case("allocator", trace, "allocate", {"adapter_config": config, "steps": steps})


def _penalty_case(penalty: Penalty) -> Case:
    config = _config(penalty.config)
    rng = generator(f"{METHOD}.penalty.{penalty.name}")
    tensors = _tensors(rng, penalty.draw, config["init_r"], penalty.sizes)
    for (module, key), size in penalty.sized.items():
        tensors[module][key] = size * _orthogonal(rng, tensors[module][key].shape)
    return _case("penalty", penalty, "aux_loss", {"adapter_config": config, "parameters": tensors})


def _case(topic: str, asked: Trace | Penalty, operation: str, question: Mapping[str, Any]) -> Case:
    name = f"{METHOD}.{topic}.{asked.name}.{operation}"
    return Case(id=name, method=METHOD, operation=operation, clause=asked.clause, question=question)


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete: nothing is left to a port's defaults."""
    return config_of(build_method(METHOD, config))


def _tensors(rng: np.random.Generator, draw: str, r: int, sizes: Sizes) -> dict[str, dict[str, NDArray]]:
    shapes = {name: ((r, n_in), (r, 1), (out, r)) for name, (n_in, out) in sizes.items()}
    return {name: {key: NUMBERS[draw](rng, shape) for key, shape in zip(KEYS, own, strict=True)} for name, own in shapes.items()}


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """As many rows, or columns, of a Hadamard matrix of +-1, each entry of the long side with a sign of its own."""
    n, r = max(shape), min(shape)
    H: NDArray = np.ones((1, 1))
    while H.shape[0] < n:
        H = np.kron([[1.0, 1.0], [1.0, -1.0]], H)
    rows: NDArray = H[rng.permutation(n)[:r]] * rng.choice([-1.0, 1.0], n)
    return rows if shape[0] == r else rows.T


def _make_twins(tensors: dict[str, NDArray], one: int, other: int) -> None:
    """Triplet `other` gets the numbers of triplet `one`."""
    for key, value in tensors.items():
        rows = value.T if key == KEYS.B else value
        rows[other] = rows[one]
