"""A prompt of somebody's own, registered: read, written and judged like the others, and refused where it is incomplete or taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import peft_ref
from peft_ref.arrays import Array, namespace, to
from peft_ref.backend import get_backend
from peft_ref.check.case import Answer, Case
from peft_ref.check.corpus import corpus
from peft_ref.check.judge import judge
from peft_ref.check.mistake import Mistake, Suite
from peft_ref.check.mistakes import SUITES
from peft_ref.check.oracle import answer
from peft_ref.check.port import BackendPort
from peft_ref.check.prompt_family import batch_mistakes, other_prompt
from peft_ref.check.prompting import PromptVariant
from peft_ref.check.variants import Variant
from peft_ref.errors import ConfigError, KeyMismatchError
from peft_ref.files.adapter import AdapterFile, all_tensors, load_adapter, save_adapter
from peft_ref.files.config import flatten, from_dict
from peft_ref.methods import METHODS
from peft_ref.prompts import EMBEDDING, NO_SOURCES, SAVED, Context, Prompt, Sources, TablePrompt, Tensors
from peft_ref.registry.complete import check_complete
from tests.check.function_port import FunctionPort

SIZES = {"num_virtual_tokens": 3, "token_dim": 5, "num_transformer_submodules": 1, "num_attention_heads": 1, "num_layers": 2}
GATE = "gate"


@dataclass(frozen=True, kw_only=True)
class Gated(TablePrompt):
    """table = s g E, a gate g (rows, 1) for every virtual token.   dE = s g G    dg = s times the rows' sums of E * G"""

    gate_scale: float = 1.0

    peft_type: ClassVar[str] = "GATED"
    tuner_prefix: ClassVar[str] = "gated_"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {EMBEDDING: self.table_shape} if self.inference_mode else {EMBEDDING: self.table_shape, GATE: (self.table_shape[0], 1)}

    def init(self, like: Array, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Tensors:
        return {name: to(rng.normal(size=shape), like) for name, shape in self.shapes().items()}

    def table(self, p: Tensors, ctx: Context) -> Array:
        return p[EMBEDDING] if self.inference_mode else self.gate_scale * p[GATE] * p[EMBEDDING]

    def table_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors:
        if self.inference_mode:
            return {EMBEDDING: d}
        gate = namespace(d).sum(p[EMBEDDING] * d, axis=1, keepdims=True)
        return {EMBEDDING: self.gate_scale * p[GATE] * d, GATE: self.gate_scale * gate}


@dataclass(frozen=True, kw_only=True)
class Pair(Prompt):
    """prompt = u v^T for every example, and both are saved, under keys of its own."""

    peft_type: ClassVar[str] = "PAIR"
    tuner_prefix: ClassVar[str] = "pair_"
    file_keys: ClassVar[frozenset[str]] = frozenset({"pair_u", "pair_v"})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"u": self.table_shape[:1], "v": self.table_shape[1:]}

    def init(self, like: Array, rng: np.random.Generator, sources: Sources = NO_SOURCES) -> Tensors:
        return {name: to(rng.normal(size=shape), like) for name, shape in self.shapes().items()}

    def prompt(self, p: Tensors, ctx: Context) -> Array:
        xp = namespace(p["u"])
        return xp.broadcast_to(xp.expand_dims(p["u"], axis=1) * p["v"], (ctx.batch, *self.table_shape))

    def prompt_vjp(self, p: Tensors, ctx: Context, d: Array) -> Tensors:
        D = namespace(d).sum(d, axis=0)
        return {"u": D @ p["v"], "v": p["u"] @ D}

    def saved(self, p: Tensors) -> Tensors:
        return {f"pair_{name}": value for name, value in p.items()}

    def loaded(self, file: Tensors) -> Tensors:
        return self.check({name.removeprefix("pair_"): value for name, value in file.items()})


def _open(p: Any) -> Array:
    return p.method.prompt({**p.tensors, GATE: p.tensors[GATE] * 0 + 1}, p.ctx)


SUITE = Suite(
    variants=(),
    prompts=(
        PromptVariant(name="plain", clause="GATED-C1", config={**SIZES, "gate_scale": 0.5}),
        PromptVariant(name="spliced", clause="GATED-C2", config=SIZES, operations=("splice",)),
    ),
    mistakes=(
        Mistake(name="gate-forgotten", clause="GATED-C1", sentence="the gate is 1", replay=other_prompt(_open)),
        *batch_mistakes("GATED-C1"),
    ),
)


@pytest.fixture
def own() -> Iterator[None]:
    METHODS.register("gated", Gated)
    METHODS.register("pair", Pair)
    SUITES.register("gated", SUITE)
    try:
        yield
    finally:
        for name in METHODS.registered & set(SUITES):
            SUITES.unregister(name)
        for name in METHODS.registered:
            METHODS.unregister(name)


# ---- read and written


@pytest.mark.usefixtures("own")
def test_it_is_a_prompt_like_the_others() -> None:
    assert {"gated", "pair"} <= METHODS.prompts.keys()
    assert peft_ref.Gated is Gated  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue] - lazy
    data = {"peft_type": "GATED", **SIZES, "gate_scale": 2.5, "task_type": "CAUSAL_LM", "later": [1]}
    config = from_dict(data)
    assert config.method == Gated(**SIZES, gate_scale=2.5)  # type: ignore[arg-type]
    assert flatten(config) == data
    with pytest.raises(ConfigError, match="gate_scale='2' is of type str"):
        from_dict({**data, "gate_scale": "2"})
    sized = Gated(num_virtual_tokens=2).sized({"hidden_size": 6, "num_attention_heads": 3, "num_hidden_layers": 4}, "SEQ_2_SEQ_LM")
    assert sized.shapes() == {EMBEDDING: (4, 6), GATE: (4, 1)}


@pytest.mark.usefixtures("own")
def test_its_adapter_folder_survives(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    method = Gated(**SIZES, gate_scale=0.5)  # type: ignore[arg-type]
    trained = method.init(np.zeros(0), rng)
    config = from_dict({"peft_type": "GATED", **SIZES, "gate_scale": 0.5, "modules_to_save": ["head"], "inference_mode": True})
    head = {"base_model.head.weight": rng.normal(size=(2, 3))}
    save_adapter(tmp_path, AdapterFile(config=config, prompt=method.loaded(method.saved(trained)), modules_to_save=head))
    back = load_adapter(tmp_path)
    assert all_tensors(back).keys() == {SAVED, *head}
    np.testing.assert_array_equal(back.prompt[EMBEDDING], 0.5 * trained[GATE] * trained[EMBEDDING])  # type: ignore[arg-type]


@pytest.mark.usefixtures("own")
def test_a_file_of_keys_of_its_own_survives(tmp_path: Path) -> None:
    method = Pair(**SIZES)  # type: ignore[arg-type]
    config = from_dict({"peft_type": "PAIR", **SIZES})
    tensors: Mapping[str, Any] = method.init(np.zeros(0), np.random.default_rng(8))
    save_adapter(tmp_path, AdapterFile(config=config, prompt=tensors))
    back = load_adapter(tmp_path)
    assert all_tensors(back).keys() == {"pair_u", "pair_v"}
    for name in ("u", "v"):
        np.testing.assert_array_equal(back.prompt[name], tensors[name])
    save_adapter(tmp_path, replace(back, config=from_dict({"peft_type": "GATED", **SIZES}), prompt={EMBEDDING: np.ones((3, 5))}))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PAIR"}')
    with pytest.raises(KeyMismatchError, match="'prompt_embeddings' is no tensor of Pair, which saves pair_u, pair_v"):
        load_adapter(tmp_path)


# ---- judged


@pytest.mark.usefixtures("own")
def test_a_port_of_it_is_judged_right() -> None:
    cases = corpus("gated")
    assert [c.operation for c in cases] == ["prompt", "prompt_backward", "saved", "splice"]
    for dtype in ("float64", "float32", "bfloat16"):
        report = judge(BackendPort(get_backend("peft_ref_backends.numpy:NumpyBackend"), dtype), cases)
        assert [v.status for v in report.verdicts] == ["right"] * 4
        assert not report.diagnoses


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", ["gate-forgotten", "gradient-averaged"])
def test_a_port_that_makes_a_known_mistake_is_told_so(name: str) -> None:
    mistake = next(m for m in SUITE.mistakes if m.name == name)

    def wrong(case: Case) -> Answer | None:
        out = mistake.replay(case)
        return answer(case) if out is None else out

    report = judge(FunctionPort(wrong, "float32"), corpus("gated"))
    assert [d.mistakes for d in report.diagnoses] == [(name,)]


def test_its_gradient_is_the_derivative() -> None:
    """What the judge takes for right is the method's own word: calculus has to agree."""
    rng = np.random.default_rng(2)
    for method in (Gated(**SIZES, gate_scale=1.5), Pair(**SIZES)):  # type: ignore[arg-type]
        p, way = (method.init(np.zeros(0), rng) for _ in range(2))
        ctx, d = Context(batch=2), rng.normal(size=(2, *method.table_shape))
        plus, minus = ({k: p[k] + h * way[k] for k in p} for h in (1e-4, -1e-4))
        slope = (d * (method.prompt(plus, ctx) - method.prompt(minus, ctx))).sum() / 2e-4
        grads = method.prompt_vjp(p, ctx, d)
        assert sum((grads[k] * way[k]).sum() for k in p) == pytest.approx(slope, rel=1e-7)


def test_it_is_gone_afterwards() -> None:
    assert not {"gated", "pair"} & METHODS.keys()
    with pytest.raises(ConfigError, match="'GATED' is not built here"):
        from_dict({"peft_type": "GATED"})


# ---- refused


def another(parent: type[Prompt] = Gated, class_name: str = "Another", **variables: Any) -> Any:
    body = {"peft_type": "MINE", "tuner_prefix": "mine_", "__annotations__": {}, "__module__": __name__, **variables}
    return dataclass(frozen=True, kw_only=True)(type(class_name, (parent,), body))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a name that is built in": ("prompt_tuning", {}, "the name is taken, by PromptTuning"),
    "a name that is registered": ("gated", {}, "the name is taken, by Gated"),
    "a class name": ("mine", {"class_name": "PrefixTuning"}, "the class name PrefixTuning is taken, by peft_ref.methods.prefix_tuning"),
    "a peft_type": (
        "mine",
        {"peft_type": "PROMPT_TUNING", "tuner_prefix": "prompt_tuning_"},
        "peft_type PROMPT_TUNING is taken, by Prompt",
    ),
    "a prefix": ("mine", {"tuner_prefix": "prompt_"}, "'prompt_tuning_' is that of"),
    "another prefix than PEFT's": ("mine", {"peft_type": "POLY"}, "tuner_prefix='mine_', but PEFT's of POLY is 'poly_'"),
    "another place": ("mine", {"place": "attention"}, "place='attention': one of embeddings, cache"),
    "nothing saved": ("mine", {"file_keys": frozenset()}, r"file_keys=\[\]: the keys of what it saves"),
    "the model's own keys": ("mine", {"file_keys": frozenset({"base_model.x"})}, r"file_keys=\['base_model\.x'\]: the keys"),
    "a table that is not saved alone": (
        "mine",
        {"shapes": lambda self: {EMBEDDING: self.table_shape, GATE: (2, 1)}},
        r"in inference mode its tensors are .*'gate'.*: a saved TablePrompt is",
    ),
    "an empty tensor": ("mine", {"parent": Pair, "shapes": lambda self: {"u": (0,)}}, r"'u' has the shape \(0,\): give positive sizes"),
    "no tensors": ("mine", {"parent": Pair, "shapes": lambda self: {}}, "it has no tensors"),
    "a word of the configuration": (
        "mine",
        {"bias": "none", "__annotations__": {"bias": "str"}},
        "bias: a word of adapter_config.json that means something else",
    ),
    "a hyper-parameter that must be given": ("mine", {"__annotations__": {"gates": "int"}}, "no default: gates"),
}


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_taken_or_lacks_something_is_refused(what: str) -> None:
    name, changes, message = REFUSED[what]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        METHODS.register(name, another(**changes))
    assert METHODS.registered == {"gated", "pair"}


class Loose(Prompt):
    size: int


def test_a_class_that_is_no_whole_prompt_is_told_all_it_lacks() -> None:
    with pytest.raises(ConfigError) as caught:
        check_complete("mine", Loose)
    for message in (
        "not written: init, loaded, prompt, prompt_vjp, saved, shapes",
        "no class variable peft_type, tuner_prefix",
        "it is no d",
    ):
        assert message in str(caught.value)


@pytest.mark.usefixtures("own")
def test_a_suite_that_cannot_be_asked_is_refused() -> None:
    SUITES.unregister("gated")
    plain, _ = SUITE.prompts
    layers = (Variant(name="plain", clause="X-C1", configs=({},)),)
    for wrong, message in (
        (replace(SUITE, prompts=()), "no variants, so nothing would be asked.\n  Give one PromptVariant"),
        (replace(SUITE, prompts=(plain, plain)), "two variants are called 'plain'"),
        (replace(SUITE, variants=layers), "variant 'plain': Gated is a prompt, which has no layers.\n  Ask with PromptVariant"),
        (replace(SUITE, prompts=(replace(plain, operations=("merge",)),)), "variant 'plain': no operation 'merge'.\n  There are prompt, "),
        (replace(SUITE, prompts=(replace(plain, config={**SIZES, "rank": 2}),)), "rank are no hyper-parameters of Gated"),
        (replace(SUITE, prompts=(replace(plain, config={"num_virtual_tokens": 2}),)), "token_dim is not given"),
    ):
        with pytest.raises(ConfigError, match=message):
            SUITES.register("gated", wrong)
    SUITES.register("gated", SUITE)
    assert SUITES["gated"] is SUITE
