"""The smallest question on which a port is still wrong, found by asking it: dimensions first, then numbers.

Hypothesis searches, from the smallest shapes upwards, through the port's own process; it shrinks what it finds towards zeros and ones.
A convolution keeps its shape and loses its numbers, and so does a prompt; a training loses its last steps too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from peft_ref.check.case import (
    ARRAY_OPERATIONS,
    TRAINING_OPERATIONS,
    Answer,
    Case,
    CaseAdapter,
    NDArray,
    build_method,
    encode,
    map_arrays,
    to_json,
)
from peft_ref.check.diagnose import expectation
from peft_ref.check.port import Answered, Port
from peft_ref.check.protocol import nest
from peft_ref.check.result import Counterexample
from peft_ref.check.tolerance import Expected, compare
from peft_ref.errors import UnsupportedLayerError
from peft_ref.layers import Embedding, Layer, Linear

SECONDS = 6.0
EXAMPLES = 12
SIDES, RANKS, ROWS = (1, 2, 3), (1, 2, 4), (1, 2)


def smallest(port: Port, cases: Sequence[Case], dtype: str, seconds: float = SECONDS) -> Counterexample | None:
    """A smallest wrong case like the first of `cases` that is about arrays, found within `seconds`, or None."""
    case = next((c for c in cases if c.operation in ARRAY_OPERATIONS), None)
    if case is None:
        return None
    asker = _Asker(port, dtype, time.monotonic() + seconds)
    found = _by_dimensions(asker, case) if isinstance(case.layer, Linear | Embedding) else None
    if found is None and asker.wrong(case):
        found = _by_zeroing(asker, _shortened(asker, case))
    return None if found is None else asker.counterexample(found)


class _Asker:
    """Asks the port until time is up, and remembers how often."""

    def __init__(self, port: Port, dtype: str, deadline: float) -> None:
        self._port, self._dtype, self._deadline = port, dtype, deadline
        self.round_trips = 0

    def wrong(self, case: Case) -> bool:
        """Whether the port's answer is wrong; False where there is none, where nothing is right, or where time is up."""
        if time.monotonic() > self._deadline:
            return False
        try:
            expected = self._expected(case)
        except (ZeroDivisionError, ValueError):
            return False  # a zero norm or factor: not a question
        self.round_trips += 1
        got = self._answer(case, expected)
        return got is not None and compare(got, expected).ratio > 1

    def _answer(self, case: Case, expected: Expected) -> Answer | None:
        """The port's answer, if it has the arrays and shapes that were asked for."""
        reply = self._port.ask(case)
        if not isinstance(reply, Answered) or reply.answer.keys() != expected.values.keys():
            return None
        got = {k: np.asarray(v) for k, v in reply.answer.items()}
        return got if all(got[k].shape == v.shape for k, v in expected.values.items()) else None

    def _expected(self, case: Case) -> Expected:
        return expectation(case, self._dtype)

    def counterexample(self, case: Case) -> Counterexample | None:
        expected = self._expected(case)
        got = self._answer(case, expected)
        if got is None:
            return None
        worst = compare(got, expected)
        if worst.ratio <= 1:  # asked once more, the port is right: it does not always answer alike
            return None
        want = {k: encode(v) for k, v in expected.values.items()}
        told, right = worst.texts
        text = f"{_numbers(case)} -> you {told}, want {right} at {worst.name}{list(worst.index) or ''}"
        return Counterexample(
            case=to_json(case),
            got=nest(case, {k: encode(v) for k, v in got.items()}),
            want=nest(case, want),
            text=text,
            round_trips=self.round_trips,
        )


def _by_dimensions(asker: _Asker, case: Case) -> Case | None:
    import hypothesis
    from hypothesis import strategies as st
    from hypothesis.errors import NoSuchExample, Unsatisfiable

    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
        verbosity=hypothesis.Verbosity.quiet,
    )
    for n_in, out, r, rows in _sizes(case):
        template = resized(case, n_in, out, r, rows)
        if template is None:
            continue
        length = sum(v.size for v in _arrays(template))
        numbers = st.lists(st.sampled_from((0, 1, -1, 2, -2)), min_size=length, max_size=length)

        def is_wrong(values: list[int], template: Case = template) -> bool:
            return asker.wrong(filled(template, values))

        try:
            from random import Random

            values = hypothesis.find(numbers, is_wrong, settings=settings, random=Random(0))
        except (NoSuchExample, Unsatisfiable):
            continue
        return filled(template, values)
    return None


def _sizes(case: Case) -> list[tuple[int, int, int, int]]:
    """in, out, r, rows, the smallest together first. The case's own rank is among them: a port may be wrong from some rank on."""
    own = max((a.config.get("r", 1) for a in case.adapters), default=1)
    ranks = sorted({*(r for r in RANKS if r < own), own})
    return sorted(product(SIDES, SIDES, ranks, ROWS), key=lambda s: (sum(s), s))


def _shortened(asker: _Asker, case: Case) -> Case:
    """Without the steps of a training that are not needed, the last ones first."""
    while len(steps := case.question.get("steps", ())) > 1:
        tried = replace(case, id=f"{case.id.removesuffix('.smallest')}.smallest", question={**case.question, "steps": steps[:-1]})
        if not asker.wrong(tried):
            break
        case = tried
    return case


def _by_zeroing(asker: _Asker, case: Case) -> Case:
    """As many numbers zero as can be, the others one where they can be: halves first, then each."""
    values = [float(v) for a in _arrays(case) for v in a.reshape(-1)]
    chunk = max(len(values) // 2, 1)
    while chunk >= 1:
        for at in range(0, len(values), chunk):
            part = values[at : at + chunk]
            if any(part):
                tried = [*values[:at], *([0.0] * len(part)), *values[at + chunk :]]
                if asker.wrong(filled(case, tried)):
                    values = tried
        chunk //= 2
    for at, value in enumerate(values):
        tried = [*values[:at], 1.0, *values[at + 1 :]]
        if value not in (0.0, 1.0) and asker.wrong(filled(case, tried)):
            values = tried
    return filled(case, values)


def resized(case: Case, n_in: int, out: int, r: int, rows: int) -> Case | None:
    """The case with other dimensions and zeros everywhere; None if it cannot have them."""
    layer: Layer
    if isinstance(case.layer, Linear):
        layer = replace(case.layer, in_features=n_in, out_features=out)
    else:
        layer = Embedding(num_embeddings=n_in, embedding_dim=out)
    adapters = []
    for a in case.adapters:
        method = build_method(case.method, config := _smaller(a.config, n_in, out, r))
        try:
            method.check_layer(layer)
        except UnsupportedLayerError:
            return None
        tensors = {s.key: np.zeros(s.stored_shape) for s in method.spec(layer)}
        tensors |= {k: v for k, v in method.untrained(layer).items() if v.dtype.kind in "iu"}
        dropout = None
        if a.dropout is not None:
            dropout = (np.arange(rows * n_in).reshape(rows, n_in) % 2, a.dropout[1])
        adapters.append(CaseAdapter(config=config, tensors=tensors, dropout=dropout))
    bias = None if case.bias is None else np.zeros(out)
    x = np.arange(rows) % n_in if layer.kind == "embedding" else np.zeros((rows, n_in))
    return replace(
        case,
        id=f"{case.id}.smallest",
        layer=layer,
        weight=np.zeros(layer.weight_shape),
        bias=bias,
        adapters=tuple(adapters),
        x=None if case.x is None else x,
        dy=None if case.dy is None else np.zeros((rows, out)),
        merged_weight=None if case.merged_weight is None else np.zeros(layer.weight_shape),
        merged_bias=None if case.merged_bias is None else np.zeros(out),
    )


def _smaller(config: Mapping[str, Any], n_in: int, out: int, r: int) -> dict[str, Any]:
    """The configuration with sizes that fit."""
    fitting: dict[str, int] = {}
    if "r" in config:
        fitting["r"] = min(r, config["r"])
    if "block_size" in config:
        fitting["block_size"] = math.gcd(n_in, out, config["block_size"])
    if "n_frequency" in config:
        fitting["n_frequency"] = min(n_in * out, config["n_frequency"])
    return {**config, **fitting}


def _arrays(case: Case) -> list[NDArray]:
    """Every float array of the case, in a fixed order; the adapters' first, because they should shrink last."""
    tensors = [v for a in case.adapters for v in a.tensors.values()]
    given = [case.x, case.dy, case.merged_weight, case.weight, case.bias, case.merged_bias]
    map_arrays(given.append, case.question)
    return [v for v in (*tensors, *given) if v is not None and v.dtype.kind == "f"]


def filled(case: Case, values: Sequence[float]) -> Case:
    """The case with its float arrays' numbers replaced, in the order of `_arrays`."""
    rest = list(values)

    def take(array: NDArray | None) -> NDArray | None:
        if array is None or array.dtype.kind != "f":
            return array
        numbers, rest[:] = rest[: array.size], rest[array.size :]
        return np.asarray(numbers, dtype=np.float64).reshape(array.shape)

    adapters = []
    for a in case.adapters:
        tensors = {k: v for k, v in ((k, take(v)) for k, v in a.tensors.items()) if v is not None}
        adapters.append(replace(a, tensors=tensors))
    fields: dict[str, Any] = {n: take(getattr(case, n)) for n in ("x", "dy", "merged_weight", "weight", "bias", "merged_bias")}
    return replace(case, adapters=tuple(adapters), **fields, question=map_arrays(take, case.question))


def _numbers(case: Case) -> str:
    """The question in one line."""
    if case.operation in TRAINING_OPERATIONS:
        asked = map_arrays(encode, {k: v for k, v in case.question.items() if k != "adapter_config"})
        return json.dumps(asked).replace(".0", "").replace(" ", "")
    parts = [] if case.weight is None else [f"W={_short(case.weight)}"]
    parts += [] if case.bias is None else [f"b={_short(case.bias)}"]
    for a in case.adapters:
        parts += [f"{k}={_short(v)}" for k, v in a.tensors.items()]
        parts += [
            f"{k}={v}" for k, v in a.config.items() if k in ("r", "lora_alpha", "alpha", "use_rslora", "is_feedforward") and v is not False
        ]
    for name in ("x", "dy", "merged_weight", "merged_bias"):
        value = getattr(case, name)
        parts += [] if value is None else [f"{name}={_short(value)}"]
    return " ".join([*parts, *_asked(case.question)])


def _asked(question: Mapping[str, Any]) -> Iterator[str]:
    for name, value in question.items():
        if isinstance(value, Mapping):
            yield from _asked(value)
        else:
            yield f"{name}={_short(value) if isinstance(value, np.ndarray) else value}"


def _short(array: NDArray | None) -> str:
    text = json.dumps(encode(array)).replace(".0", "").replace(" ", "")
    return text if len(text) <= 90 else f"{text[:86]}..."
