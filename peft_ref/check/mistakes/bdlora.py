"""BD-LoRA: what is asked, and what ports get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from peft_ref.arrays import Array
from peft_ref.check import lora_family as lora
from peft_ref.check import shared_mistakes as shared
from peft_ref.check.asked import Config, Files, Fresh, Start
from peft_ref.check.case import Answer, Case
from peft_ref.check.distributions import Law, constant, uniform
from peft_ref.check.lora_starts import laws as lora_laws
from peft_ref.check.lora_variants import FAMILY, variants
from peft_ref.check.mistake import Mistake, Replay, Suite, only
from peft_ref.check.oracle import answer
from peft_ref.check.variants import Variant
from peft_ref.layers import Layer

BLOCKS = {"use_bdlora": {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2, "match_strict": False}}
A, B = {**BLOCKS, "diagonal": "A"}, {**BLOCKS, "diagonal": "B"}
NEITHER = {**BLOCKS, **lora.PLAIN, "diagonal": ""}

Place = Callable[[int, int], int | None]  # given the block of rows and the number of blocks, the block of columns where it goes


def placed(V: Array, n: int, place: Place) -> Array:
    """`V` (rows, columns), n blocks one under the other, each put elsewhere."""
    if n == 1:
        return V
    size, columns = V.shape[0] // n, V.shape[1]
    zero = 0 * V[:size]
    rows = []
    for k in range(n):
        at, block = place(k, n), V[k * size : (k + 1) * size]
        rows.append(np.concatenate([block if j == at or at is None else zero for j in range(n)], axis=1))
    return np.concatenate(rows, axis=0) if columns else V


def dealt(V: Array, n: int) -> Array:
    """Row i belongs to block i mod n."""
    rows = [np.concatenate([V[i : i + 1] if j == i % n else 0 * V[i : i + 1] for j in range(n)], axis=1) for i in range(V.shape[0])]
    return np.concatenate(rows, axis=0)


def strided(V: Array, n: int) -> Array:
    """A block takes every n-th column."""
    wide = placed(V, n, lambda k, n: k)
    m = V.shape[1]
    return np.concatenate([wide[:, j * m + i : j * m + i + 1] for i in range(m) for j in range(n)], axis=1)


def with_blocks(build: Callable[[Array, int], Array]) -> Replay:
    def delta(layer: Layer, method, p, W0):  # type: ignore[no-untyped-def]  # as shared.other_delta gives them
        a, b = method.blocks("A"), method.blocks("B")
        if a == b == 1:
            return None
        return method.scale * ((build(p.B, b) if b > 1 else p.B) @ (build(p.A, a) if a > 1 else p.A))

    return shared.other_delta(delta)


def _second_block_idle(case: Case) -> Answer | None:
    """The gradient of the first block alone."""
    key = {"A": "lora_A.weight", "B": "lora_B.weight"}
    right, changed = answer(case), False
    for i, a in enumerate(case.adapters):
        if (name := key.get(str(a.config["diagonal"]))) is not None:
            g = right[f"{i}.{name}"]
            half = g.shape[0] // 2
            right, changed = {**right, f"{i}.{name}": np.concatenate([g[:half], 0 * g[half:]])}, True
    return right if changed else None


def laws(config: Config, layer: Layer) -> dict[str, Law]:
    own, n = lora_laws(config, layer), config["use_bdlora"]["nblocks"]
    if config["diagonal"] == "A":
        own = {**own, "lora_A.weight": uniform(math.sqrt(6 * n / layer.shape[1]))}
    if config["diagonal"] == "B":
        own = {**own, "lora_B.weight": constant(0.0, "init-B-random")}
    return own


FRESH = Fresh(
    clause="BDLORA-C9",
    starts={
        "A": Start({**lora.PLAIN, **A}, ("linear-both",)),
        "B": Start({**lora.PLAIN, **B}, ("linear-both",)),
        "A-false": Start({**lora.PLAIN, **A, "init_lora_weights": False}, ("linear-both",)),
    },
    laws=laws,
)
FILES = Files(
    configs_clause="BDLORA-C12",
    keys_clause="BDLORA-C13",
    configs={
        "neither": {"r": 4, "lora_alpha": 6, "use_bdlora": {"match_strict": False}},
        "both": {
            "r": 4,
            "lora_alpha": 6,
            "use_bdlora": {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj", "v_", "up"], "nblocks": 2},
        },
    },
    told={"r": "r", "scaling": "scale"},
)

SUITE = Suite(
    variants=(
        *variants("BDLORA-C1", A, ("linear-both",)),
        *variants("BDLORA-C2", B, ("linear-both",), prefix="B-"),
        Variant(name="plain", clause="BDLORA-C3", configs=(NEITHER,), layers=("linear", "transposed_linear")),
        Variant(
            name="rounded",
            clause="BDLORA-C3",
            configs=({**NEITHER, "r": 9, "lora_alpha": 5},),
            layers=("linear-large",),
            numbers="rounded",
        ),
    ),
    fresh=FRESH,
    files=FILES,
    mistakes=(
        *FAMILY,
        Mistake(
            name="blocks-everywhere",
            clause="BDLORA-C1",
            sentence="every block is repeated along its rows instead of standing on the diagonal alone",
            replay=with_blocks(lambda V, n: placed(V, n, lambda k, n: None)),
        ),
        Mistake(
            name="blocks-reversed",
            clause="BDLORA-C1",
            sentence="the blocks stand on the other diagonal, the last one first",
            replay=with_blocks(lambda V, n: placed(V, n, lambda k, n: n - 1 - k)),
        ),
        Mistake(
            name="blocks-first-only",
            clause="BDLORA-C1",
            sentence="every block reads the first block's columns: the blocks are one under the other, not along the diagonal",
            replay=with_blocks(lambda V, n: placed(V, n, lambda k, n: 0)),
        ),
        Mistake(
            name="blocks-rows-dealt",
            clause="BDLORA-C1",
            sentence="the rows are dealt out to the blocks in turn instead of one block after the other",
            replay=with_blocks(dealt),
        ),
        Mistake(
            name="blocks-columns-dealt",
            clause="BDLORA-C1",
            sentence="a block takes every n-th column instead of neighbouring ones",
            replay=with_blocks(strided),
        ),
        Mistake(
            name="blocks-averaged",
            clause="BDLORA-C4",
            sentence="the scale is divided by the number of blocks",
            replay=with_blocks(lambda V, n: placed(V, n, lambda k, n: k) / n),
        ),
        Mistake(
            name="grad-first-block-only",
            clause="BDLORA-C7",
            sentence="only the first block has a gradient",
            replay=only(backward=_second_block_idle),
        ),
        shared.only_first_adapter("BDLORA-C5"),
    ),
)
