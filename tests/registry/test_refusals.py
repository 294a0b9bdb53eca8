"""What cannot be registered, and what is asked for and not built: each an error that says what is missing or who has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import pytest

from peft_ref.arrays import Array
from peft_ref.check.mistakes import SUITES
from peft_ref.check.prompting import PromptVariant
from peft_ref.contracts import Additive, Key
from peft_ref.errors import ConfigError
from peft_ref.methods import METHODS, method_class
from peft_ref.registry import PeftType, Registry
from peft_ref.registry.complete import check_complete


class Mine(NamedTuple):
    u: Annotated[Array, "out", Key("mine_u")]


class Bare(NamedTuple):
    u: Array


class Lettered(NamedTuple):
    u: Annotated[Array, "out q", Key("mine_u")]


class Elsewhere(NamedTuple):
    u: Annotated[Array, "out", Key("theirs_u")]


class Loras(NamedTuple):
    u: Annotated[Array, "out", Key("lora_A.weight")]


class Twice(NamedTuple):
    u: Annotated[Array, "out", Key("mine_u")]
    v: Annotated[Array, "out", Key("mine_u")]


def another(own: ModuleType, class_name: str = "Another", **variables: Any) -> Any:
    """The method of CONTRIBUTING.md again, with other class variables."""
    variables = {"peft_type": "MINE", "tuner_prefix": "mine_", "params_type": Mine, **variables}
    body = {**variables, "__annotations__": {}, "__module__": own.Outer.__module__}
    return dataclass(frozen=True, kw_only=True)(type(class_name, (own.Outer,), body))


TAKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "a name that is built in": ("lora", {}, "the name is taken, by LoRA"),
    "a name that is registered": ("outer", {}, "the name is taken, by Outer"),
    "a class name": ("mine", {"class_name": "DoRA"}, "the class name DoRA is taken, by peft_ref.methods.dora"),
    "a peft_type": ("mine", {"peft_type": "OUTER", "tuner_prefix": "outer_"}, "peft_type OUTER is taken, by Outer"),
    "a flag of a peft_type": ("mine", {"peft_type": "LORA", "flag": "use_dora"}, "peft_type LORA with use_dora is taken, by DoRA"),
    "a key": ("mine", {"params_type": Loras}, "the checkpoint key 'lora_A.weight' is taken, by BDLoRA"),
    "a prefix that is registered": ("mine", {"tuner_prefix": "outer_"}, "the tuner prefix 'outer_' is taken: 'outer_' is that of Outer"),
    "a prefix of PEFT's": ("mine", {"tuner_prefix": "boft_"}, "the tuner prefix 'boft_' is taken: 'boft_' is that of PEFT's BOFT"),
    "the beginning of a prefix": ("mine", {"tuner_prefix": "prompt_"}, "'prompt_tuning_' is that of PEFT's PROMPT_TUNING"),
    "a prefix and more": ("mine", {"tuner_prefix": "ia3_x_"}, "'ia3_' is that of IA3|'ia3_' is that of PEFT's IA3"),
    "another prefix than PEFT's": ("mine", {"peft_type": "LILY"}, "tuner_prefix='mine_', but PEFT's of LILY is 'lily_'"),
    "a key without the prefix": ("mine", {"params_type": Elsewhere}, "'theirs_u' does not begin with 'mine_'"),
}


@pytest.mark.parametrize("what", TAKEN)
def test_what_is_taken_is_refused_by_its_owner(what: str, own: ModuleType) -> None:
    name, changes, message = TAKEN[what]
    with pytest.raises(ConfigError, match=message):
        METHODS.register(name, another(own, **changes))
    assert METHODS.registered == {"outer"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"peft_type": "LORA", "flag": "use_mine", "tuner_prefix": "lora_", "params_type": Loras}],
    ids=["of its own", "a flag of LORA, whose keys it may share"],
)
def test_what_is_free_is_taken_and_can_be_given_back(changes: dict[str, Any], own: ModuleType) -> None:
    cls = another(own, **changes)
    assert METHODS.register("mine", cls) is cls
    assert method_class(cls.peft_type, [str(cls.switch())] if cls.flag else []) is cls
    METHODS.unregister("mine")
    assert "mine" not in METHODS
    with pytest.raises(ConfigError, match=r"no registered method 'mine'.*\n.*Registered: outer"):
        METHODS.unregister("mine")


def test_what_came_with_the_package_stays() -> None:
    with pytest.raises(ConfigError, match="no registered method 'lora'"):
        METHODS.unregister("lora")
    with pytest.raises(TypeError):
        METHODS["lora"] = METHODS["dora"]  # type: ignore[index]  # pyright: ignore[reportIndexIssue] - the point of the test


INCOMPLETE: dict[str, tuple[dict[str, Any], str]] = {
    "shapes unsaid": ({"params_type": Bare}, "Bare.u: say its shape and key"),
    "no NamedTuple": ({"params_type": tuple}, "a NamedTuple of its parameters"),
    "a letter unknown": ({"params_type": Lettered}, "the letter 'q' of a shape is not in dims"),
    "a key twice": ({"params_type": Twice}, "the key 'mine_u' is there twice on a linear layer"),
    "a kind unknown": ({"kinds": frozenset({"attention"})}, r"kinds=\['attention'\]: some of conv1d"),
    "a kind without a key": ({"kinds": frozenset({"linear", "conv2d"})}, "no parameter has a key on a conv2d layer"),
    "a small peft_type": ({"peft_type": "mine"}, "peft_type='mine': capital letters"),
    "a prefix without its end": ({"tuner_prefix": "mine"}, "tuner_prefix='mine': lower-case letters, ending with an underscore"),
    "a flag that is no name": ({"flag": "use mine"}, "flag='use mine'"),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_what_a_class_lacks_is_said(what: str, own: ModuleType) -> None:
    changes, message = INCOMPLETE[what]
    with pytest.raises(ConfigError, match=f"Another is no complete method:(.|\n)*{message}"):
        METHODS.register("mine", another(own, **changes))


@dataclass
class Loose(Additive[Mine]):
    size: int
    target_modules: int = 1


def plain(own: ModuleType) -> Any:
    return type("Plain", (own.Outer,), {"__module__": own.Outer.__module__})


@pytest.mark.parametrize(
    ("cls", "messages"),
    [
        (lambda own: 3, ["3 is no complete method", "no subclass of LowRank, Additive, Conditioned or Reweight"]),
        (lambda own: int, ["int is no complete method", "no subclass"]),
        (plain, ["Plain is no complete method", "it is no dataclass"]),
        (
            lambda own: Loose,
            [
                "not written: delta, delta_vjp, dims, init",
                "no class variable peft_type, tuner_prefix, params_type",
                "it can be changed",
                "not keyword-only: size, target_modules",
                "no default: size",
                "target_modules: a word of adapter_config.json",
            ],
        ),
    ],
    ids=["no class", "another class", "no dataclass of its own", "all at once"],
)
def test_a_class_that_is_no_method_is_told_all_it_lacks(cls: Callable[[ModuleType], Any], messages: list[str], own: ModuleType) -> None:
    with pytest.raises(ConfigError) as caught:
        METHODS.register("mine", cls(own))
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["", "Mine", "my-method", "1st", "mine "])
def test_a_name_that_cannot_be_a_file_s_is_refused(name: str, own: ModuleType) -> None:
    with pytest.raises(ConfigError, match="a method cannot be called"):
        METHODS.register(name, another(own))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_built_in_is_complete_by_the_same_rules(name: str) -> None:
    check_complete(name, METHODS[name])


def test_the_built_in_methods_could_be_registered_one_after_the_other() -> None:
    """None has what another has taken, by the rules for everybody."""
    registry = Registry({})
    for name in METHODS.keys() - METHODS.registered:
        registry.register(name, METHODS[name])
    assert list(registry) == [name for name in METHODS if name in registry]
    assert registry.names() == METHODS.names()


# ---- what is asked for


def test_every_type_is_built_or_says_that_it_is_not_and_what_is() -> None:
    for kind in PeftType:
        if any(cls.peft_type == kind and cls.flag is None for cls in METHODS.values()):
            assert method_class(kind).peft_type == kind
        else:
            with pytest.raises(ConfigError, match=rf"'{kind}' is not built here\.\n  A method of HF PEFT\. Built: .*LORA with use_dora"):
                method_class(kind)


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("BONE", (), r"'BONE' is not built here.\n  PEFT replaced it by MISS"),
        ("lora", (), r"'lora' is not built here.\n  No method of HF PEFT either. Built: "),
        ("LORA", ("arrow_config",), r"LORA with arrow_config is not built here.\n  Built: "),
        ("IA3", ("use_dora",), r"IA3 with use_dora is not built here.\n  Built: "),
    ],
)
def test_what_is_not_built_says_so(kind: str, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"here.json: .*{message}"):
        method_class(kind, flags, "here.json")


def test_a_type_that_is_built_only_with_its_flag_says_so() -> None:
    registry = Registry({"dora": ("DoRA", "LORA")})
    with pytest.raises(ConfigError, match=r"plain LORA is not built here\.\n  Built: LORA with use_dora"):
        registry.method_class("LORA")


def test_two_flags_at_once_are_refused(own: ModuleType) -> None:
    METHODS.register("mine", another(own, peft_type="LORA", flag="use_mine", tuner_prefix="lora_", params_type=Loras))
    with pytest.raises(ConfigError, match="use_dora and use_mine are both on"):
        method_class("LORA", ["use_mine", "use_dora"])


# ---- suites


def test_a_suite_is_only_for_a_registered_method_and_only_one(own: ModuleType) -> None:
    suite = SUITES["outer"]
    with pytest.raises(ConfigError, match="suite 'mine': no method of that name was registered"):
        SUITES.register("mine", suite)
    with pytest.raises(ConfigError, match="suite 'lora': no method of that name was registered"):
        SUITES.register("lora", suite)
    with pytest.raises(ConfigError, match="suite 'outer': the method has one"):
        SUITES.register("outer", suite)


def test_a_suite_that_cannot_be_asked_is_refused(own: ModuleType) -> None:
    suite = SUITES["outer"]
    SUITES.unregister("outer")
    (variant,), (mistake,) = suite.variants, suite.mistakes
    for wrong, message in (
        (replace(suite, variants=()), "no variants, so nothing would be asked"),
        (replace(suite, variants=(variant, variant)), "two variants are called 'plain'"),
        (replace(suite, prompts=(PromptVariant(name="x", clause="", config={}),)), "Outer maps a layer's weight and is no prompt"),
        (replace(suite, mistakes=(mistake, mistake)), "two mistakes are called 'alpha-ignored'"),
        (replace(suite, variants=(replace(variant, layers=("lstm",)),)), "variant 'plain': no layer 'lstm'"),
        (replace(suite, variants=(replace(variant, configs=({"rank": 2},)),)), "rank are no hyper-parameters of Outer"),
    ):
        with pytest.raises(ConfigError, match=message):
            SUITES.register("outer", wrong)
    SUITES.register("outer", suite)
    assert SUITES["outer"] is suite
    assert dataclasses.is_dataclass(suite)
