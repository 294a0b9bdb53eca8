"""A method of another package that adds to attention is registered, judged and refused like the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import pytest

from peft_ref.arrays import Array, to
from peft_ref.attending import AddedGradients, AttentionBlock, AttentionMethod
from peft_ref.check.attending import AttentionVariant
from peft_ref.check.corpus import corpus
from peft_ref.check.judge import judge
from peft_ref.check.mistake import Suite
from peft_ref.check.mistakes import SUITES
from peft_ref.check.oracle import answer
from peft_ref.check.variants import Variant
from peft_ref.contracts import Key
from peft_ref.errors import ConfigError
from peft_ref.files.adapter import from_state_dict
from peft_ref.files.config import from_dict
from peft_ref.methods import METHODS
from tests.check.function_port import FunctionPort


class Params(NamedTuple):
    E: Annotated[Array, "1 1 hidden", Key("valued_E")]


@dataclass(frozen=True, kw_only=True)
class Valued(AttentionMethod[Params]):
    """One value for every token, whatever its query:  added = s v."""

    strength: float = 2.0

    peft_type: ClassVar[str] = "VALUED"
    tuner_prefix: ClassVar[str] = "valued_"
    params_type = Params

    def dims(self) -> Mapping[str, int]:
        return {}

    def init(self, hidden_size: int, like: Array, rng: np.random.Generator) -> Params:
        return Params(to(rng.normal(size=(1, 1, hidden_size)), like))

    def rows(self, p: Params) -> Array:
        return p.E

    def rows_vjp(self, p: Params, d: Array) -> Params:
        return Params(d)

    def added(self, p: Params, q: Array, k: Array, v: Array) -> Array:
        return self.strength * v + 0 * q

    def added_vjp(self, p: Params, q: Array, k: Array, v: Array, dy: Array) -> AddedGradients[Params]:
        summed = self.strength * np.sum(np.sum(dy, axis=0, keepdims=True), axis=2, keepdims=True)
        return AddedGradients(Params(None), 0 * q, 0 * k, summed)


BLOCK = AttentionBlock(hidden_size=6, num_attention_heads=3, num_key_value_heads=3, head_dim=2)
SUITE = Suite(
    variants=(), mistakes=(), attention=(AttentionVariant(name="plain", clause="VALUED-C1", config={"strength": 0.5}, block=BLOCK),)
)


@pytest.fixture(autouse=True)
def _taken_out() -> Iterator[None]:
    yield
    for name in METHODS.registered:
        if name in SUITES:
            SUITES.unregister(name)
        METHODS.unregister(name)


def test_it_is_read_asked_and_judged() -> None:
    METHODS.register("valued", Valued)
    SUITES.register("valued", SUITE)
    assert METHODS.attention["valued"] is Valued
    cases = corpus("valued")
    assert [c.operation for c in cases] == ["attention", "attention_backward"]
    assert judge(FunctionPort(answer, "float64"), cases, search=False).exit_code == 0
    wrong = judge(FunctionPort(lambda case: {k: 2 * v for k, v in answer(case).items()}, "float64"), cases, search=False)
    assert {v.status for v in wrong.verdicts} == {"wrong"}
    read = from_state_dict(from_dict({"peft_type": "VALUED", "strength": 0.5}), {"base_model.model.a.attn.valued_E": np.ones((1, 1, 6))})
    assert read.attention["a.attn"].method == Valued(strength=0.5)


class Twice(NamedTuple):
    E: Annotated[Array, "1 1 hidden", Key("valued_E")]
    g: Annotated[Array, "1", Key("valued_E")]


class Unknown(NamedTuple):
    E: Annotated[Array, "1 n hidden", Key("valued_E")]


def another(**variables: Any) -> Any:
    return dataclass(frozen=True, kw_only=True)(type("Another", (Valued,), {"__annotations__": {}, **variables}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"params_type": Twice}, "the key 'valued_E' is there twice"),
        ({"params_type": Unknown}, r"the letter 'n' of a shape is not in dims, nor hidden"),
        ({"params_type": dict}, "a NamedTuple of its parameters"),
        ({"peft_type": "ADAPTION_PROMPT"}, "peft_type ADAPTION_PROMPT is taken, by AdaptionPrompt"),
        ({"tuner_prefix": "lora_"}, "the tuner prefix 'lora_' is taken"),
    ],
)
def test_what_is_incomplete_or_taken_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        METHODS.register("another", another(**changes))


def test_a_suite_that_asks_with_another_kind_is_refused() -> None:
    METHODS.register("valued", Valued)
    layers = (Variant(name="plain", clause="VALUED-C1", configs=({},)),)
    for suite, says in (
        (
            replace(SUITE, variants=layers),
            "variant 'plain': Valued adds to an attention block, and has no layer.\n  Ask with AttentionVariant",
        ),
        (replace(SUITE, attention=()), "no variants, so nothing would be asked.\n  Give one AttentionVariant"),
        (replace(SUITE, attention=(replace(SUITE.attention[0], operations=("forward",)),)), "no operation 'forward'"),
        (replace(SUITE, attention=SUITE.attention * 2), "two variants are called 'plain'"),
    ):
        with pytest.raises(ConfigError, match=says):
            SUITES.register("valued", suite)
