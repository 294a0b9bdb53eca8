"""adapter_config.json: split into its parts, written back without loss, refused where it cannot be or is not built."""

from __future__ import annotations

import dataclasses
import json
import pickle
import time
from typing import Any

import numpy as np
import pytest

from peft_ref.errors import ConfigError, FileFormatError, TargetError
from peft_ref.files.config import AdapterConfig, Patterns, flatten, from_dict, parse, render
from peft_ref.layers import Linear
from peft_ref.methods import IA3, DoRA, LoHa, LoHaEffective, LoRA

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q", "v"]}


def lora(**changes: Any) -> AdapterConfig:
    return from_dict({**LORA, **changes})


def test_the_switch_chooses_the_class() -> None:
    assert type(lora().method) is LoRA
    assert type(lora(use_dora=False).method) is LoRA
    assert type(lora(use_dora=True).method) is DoRA
    assert type(from_dict({"peft_type": "LOHA"}).method) is LoHa
    assert type(from_dict({"peft_type": "IA3"}).method) is IA3


def test_the_parts_hold_what_is_theirs() -> None:
    config = lora(use_rslora=True, layers_to_transform=[1, 2], rank_pattern={"q": 2}, bias="all", from_the_future={"a": [1, None]})
    assert config.method == LoRA(r=4, lora_alpha=6, use_rslora=True)
    assert config.targets.target_modules == ("q", "v")
    assert config.targets.layers_to_transform == (1, 2)
    assert config.patterns == Patterns(rank_pattern={"q": 2})
    assert config.housekeeping == {"bias": "all", "from_the_future": {"a": [1, None]}}


def test_a_configuration_can_be_compared_and_pickled() -> None:
    assert lora() == lora()
    assert lora() != lora(r=2)
    assert pickle.loads(pickle.dumps(lora(rank_pattern={"q": 2}))) == lora(rank_pattern={"q": 2})


def test_any_formatting_is_written_back_to_the_byte() -> None:
    for text in (
        json.dumps(LORA),
        json.dumps(LORA, indent=7) + "\n",
        json.dumps({"zukünftig": 1, **LORA}, ensure_ascii=False),
        json.dumps({**LORA, "lora_alpha": 6.0, "use_dora": False, "init_lora_weights": "eva", "layers_to_transform": 3}),
    ):
        assert render(parse(text)) == text


def test_a_change_is_written_and_everything_else_stays() -> None:
    data = {**LORA, "later": [1], "use_dora": True, "init_lora_weights": "eva", "base_model_name_or_path": None}
    config = from_dict(data)
    changed = dataclasses.replace(config, method=dataclasses.replace(config.method, lora_alpha=9, use_rslora=True))
    assert flatten(changed) == {**data, "lora_alpha": 9, "use_rslora": True}
    assert list(flatten(changed)) == [*data, "use_rslora"]
    assert parse(render(changed)) == changed


def test_another_method_of_the_same_type_flips_its_switch() -> None:
    config = lora(use_dora=False, lora_bias=False)
    assert flatten(dataclasses.replace(config, method=DoRA(r=4, lora_alpha=6)))["use_dora"] is True


def test_a_new_configuration_reads_back_equal_and_sorted() -> None:
    config = AdapterConfig(method=DoRA(r=3), targets=lora().targets, patterns=Patterns(alpha_pattern={"z": 1, "a": 2}))
    text = render(config)
    assert parse(text) == config
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert list(json.loads(text)["alpha_pattern"]) == ["z", "a"]  # their order is their meaning


def test_random_configurations_survive_to_the_byte() -> None:
    rng = np.random.default_rng(20)
    words = ["q", "v", "layers.0.q", "mlp.up", "é", "a b"]

    def value() -> Any:
        return [None, True, 0, 1.5, "x", [], [1, "a"], {"b": {"c": None}}, float("inf")][rng.integers(9)]

    def some(n: int) -> list[str]:
        return [words[i] for i in rng.permutation(6)[: rng.integers(1, n)]]

    def data() -> dict[str, Any]:
        kind = str(rng.choice(["LORA", "LOHA", "IA3"]))
        ranks = {w: int(rng.integers(1, 9)) * 2 for w in some(4)}
        alphas = {w: float(rng.normal()) for w in some(4)}
        parts: dict[str, dict[str, Any]] = {
            "LORA": {
                "r": int(rng.integers(1, 40)) * 2,
                "lora_alpha": float(rng.normal()),
                "use_rslora": bool(rng.integers(2)),
                "init_lora_weights": [True, False, "gaussian", "eva", "pissa_niter_4", "olora", "lora_ga"][rng.integers(7)],
                "rank_pattern": ranks,
                "alpha_pattern": alphas,
                "use_dora": bool(rng.integers(2)),
                "lora_bias": False,
                "layers_to_transform": [None, 1, [0, 2]][rng.integers(3)],
            },
            "LOHA": {"r": int(rng.integers(1, 9)), "alpha": int(rng.integers(9)), "rank_pattern": ranks, "init_weights": True},
            "IA3": {"feedforward_modules": [None, "mlp.*", ["q"]][rng.integers(3)], "init_ia3_weights": bool(rng.integers(2))},
        }
        common = {"target_modules": ["q", *some(3)], "modules_to_save": [None, ["h"]][rng.integers(2)], "task_type": "SEQ_CLS"}
        later = {f"later_{i}": value() for i in range(rng.integers(4))}
        every = {**parts[kind], **common, **later}
        kept = {k: every[k] for k in list(every) if rng.random() < 0.8}
        items = [*kept.items(), ("peft_type", kind)]
        return dict(items[i] for i in rng.permutation(len(items)))

    kinds = set()
    for _ in range(300):
        flat = data()
        text = json.dumps(flat, indent=[None, 1, 2][rng.integers(3)])
        config = parse(text)
        kinds.add(type(config.method))
        assert render(config) == text
        assert flatten(config) == flat
        assert list(flatten(config)) == list(flat)
        bare = dataclasses.replace(config, text=None)
        assert parse(render(bare)) == bare
    assert kinds == {LoRA, DoRA, LoHa, IA3}


ADALORA = {"peft_type": "ADALORA", "init_r": 4, "total_step": 10}
REFUSED = {
    "no object": ([1], "no peft_type"),
    "no peft_type": ({"r": 4}, "no peft_type.*\n.*Built: ADALORA, .*LORA, .*LORA with use_dora"),
    "an unknown peft_type": ({"peft_type": "FOO"}, "'FOO' is not built here.\n.*Built: ADALORA, .*IA3, .*LOHA"),
    "r = 0": ({**LORA, "r": 0}, "r=0"),
    "r as text": ({**LORA, "r": "8"}, "r='8' is of type str, expected int"),
    "r as a truth value": ({**LORA, "r": True}, "r=True is of type bool"),
    "alpha as null": ({**LORA, "lora_alpha": None}, "lora_alpha=None"),
    "rslora as text": ({**LORA, "use_rslora": "yes"}, "use_rslora='yes'"),
    "an unknown init": ({**LORA, "init_lora_weights": "magic"}, "'magic'"),
    "orthogonal of odd rank": ({**LORA, "r": 3, "init_lora_weights": "orthogonal"}, "even rank"),
    "lora_bias with an init": ({**LORA, "lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias=True"),
    "lora_bias with dora": ({**LORA, "lora_bias": True, "use_dora": True}, "lora_bias with use_dora"),
    "dora with megatron": ({**LORA, "use_dora": True, "megatron_config": {"a": 1}}, "megatron_config with use_dora"),
    "layers_pattern alone": ({**LORA, "layers_pattern": "h"}, "layers_pattern without layers_to_transform"),
    "layers_pattern alone, LoHa": ({"peft_type": "LOHA", "layers_pattern": ["h"]}, "layers_pattern without layers_to_transform"),
    "layers with a pattern": ({**LORA, "target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform with target_modules"),
    "a bad bias": ({**LORA, "bias": "some"}, "bias='some'"),
    "a bad task": ({**LORA, "task_type": "COOKING"}, "task_type='COOKING'"),
    "targets of numbers": ({**LORA, "target_modules": [1]}, r"target_modules=\(1,\) is not understood"),
    "a text to save": ({**LORA, "modules_to_save": "h"}, "modules_to_save='h'"),
    "layers of text": ({**LORA, "layers_to_transform": ["1"]}, r"layers_to_transform=\('1',\) is not understood"),
    "an unfinished target pattern": ({**LORA, "target_modules": "(q"}, r"'\(q' is no regular expression"),
    "an unfinished rank pattern": ({**LORA, "rank_pattern": {"(q": 2}}, r"rank_pattern.*'\(q' is no regular expression"),
    "a rank of 0 in a pattern": ({**LORA, "rank_pattern": {"q": 0}}, "rank_pattern of 'q': r=0"),
    "an odd orthogonal rank in a pattern": ({**LORA, "init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}}, "'q'.*even rank"),
    "a pattern that is a list": ({**LORA, "rank_pattern": [1]}, "rank_pattern is a list"),
    "a pattern that is null": ({**LORA, "alpha_pattern": None}, "alpha_pattern is a NoneType.*\n.*{} for none"),
    "a switch that is text": ({**LORA, "lora_bias": "no"}, "lora_bias='no' is of type str, expected bool"),
    "pissa of no number": ({**LORA, "init_lora_weights": "pissa_niter_x"}, "'pissa_niter_x' is not built here"),
    "a part that is no map": ({**LORA, "corda_config": 3}, "corda_config=3"),
    "eva of too small a rho": ({**LORA, "eva_config": {"rho": 0.5}}, "eva_config=.*rho is 1 or more"),
    "eva of too large a tau": ({**LORA, "eva_config": {"tau": 1.5}}, "eva_config=.*tau from 0 to 1"),
    "eva of text": ({**LORA, "eva_config": {"rho": "2"}}, "eva_config="),
    "an alpha of text in a pattern": ({**LORA, "alpha_pattern": {"q": "2"}}, "alpha_pattern of 'q': lora_alpha='2'"),
    "a rank pattern of a method without rank": ({"peft_type": "IA3", "rank_pattern": {"q": 2}}, "IA3 has no r"),
    "no total_step": ({"peft_type": "ADALORA"}, "total_step=None"),
    "total_step as text": ({"peft_type": "ADALORA", "total_step": "10"}, "total_step='10' is of type str, expected int"),
    "no step to allocate in": ({**ADALORA, "tinit": 6, "tfinal": 4}, "no step is left"),
    "a step between allocations of 0": ({**ADALORA, "deltaT": 0}, "deltaT=0"),
    "a negative penalty": ({**ADALORA, "orth_reg_weight": -1}, "orth_reg_weight=-1"),
    "adalora with dora": ({**ADALORA, "use_dora": True}, "use_dora with AdaLoRA"),
    "adalora from loftq": ({**ADALORA, "init_lora_weights": "loftq"}, "init_lora_weights='loftq' with AdaLoRA"),
    "a rank in adalora's pattern": ({**ADALORA, "rank_pattern": {"q.lora_E": 3}}, "'q.lora_E': 3 is no list of true and false"),
    "numbers in adalora's pattern": ({**ADALORA, "rank_pattern": {"q.lora_E": [1, 0]}}, "is no list of true and false"),
    "a module's name in adalora's pattern": ({**ADALORA, "rank_pattern": {"q": [True]}}, "'q' is no key of an AdaLoRA rank pattern"),
    "more triplets than there were": ({**ADALORA, "rank_pattern": {"q.lora_E": [True] * 5}}, "5 triplets stay of init_r=4"),
    "feedforward that is not targeted": (
        {"peft_type": "IA3", "target_modules": ["q"], "feedforward_modules": ["w"]},
        "not all in target_modules",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_a_config_error_that_says_where(what: str) -> None:
    data, message = REFUSED[what]
    with pytest.raises(ConfigError, match=f"(?s){message}") as caught:
        parse(json.dumps(data), "here/adapter_config.json")
    assert "here/adapter_config.json" in str(caught.value) or "has no r" in str(caught.value)


NOT_BUILT: dict[str, Any] = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
}


@pytest.mark.parametrize("switch", NOT_BUILT)
def test_a_switch_that_is_not_built_is_refused_when_on_and_kept_when_off(switch: str) -> None:
    with pytest.raises(ConfigError, match=f"{switch}=.*not built yet"):
        lora(**{switch: NOT_BUILT[switch]})
    assert flatten(lora(**{switch: None}))[switch] is None


def test_what_adalora_inherits_from_lora_and_is_not_built_is_refused_when_on() -> None:
    with pytest.raises(ConfigError, match=r"target_parameters=.*not built yet"):
        from_dict({**ADALORA, "target_parameters": ["experts.weight"]})


def test_adaloras_rank_pattern_says_for_each_module_how_many_triplets_are_left() -> None:
    config = from_dict({**ADALORA, "rank_pattern": {"a.q.lora_E": [True, False, True, False], "a.v.lora_E": [False] * 4}})
    assert [config.method_for(name).dims(Linear(in_features=2, out_features=3))["r"] for name in ("a.q", "a.v", "b.q")] == [2, 0, 4]
    assert flatten(config)["rank_pattern"]["a.q.lora_E"] == [True, False, True, False]


def test_adalora_reads_every_name_of_an_init_as_true_and_no_alpha_pattern() -> None:
    """PEFT's layer asks only whether it is true, and AdaLoRA's model asks for no pattern of alphas."""
    config = from_dict({**ADALORA, "init_lora_weights": "corda", "alpha_pattern": {"q": 99}})
    assert config.method_for("a.q") == config.method
    assert flatten(config)["init_lora_weights"] == "corda"
    assert flatten(config)["alpha_pattern"] == {"q": 99}


@pytest.mark.parametrize(("init", "meaning"), [("eva", True), ("lora_ga", True), ("pissa_niter_16", "pissa"), ("corda", "corda")])
def test_an_init_that_needs_data_means_what_a_saved_adapter_computes_and_is_kept(init: str, meaning: bool | str) -> None:
    config = lora(init_lora_weights=init)
    assert config.method == LoRA(r=4, lora_alpha=6, init_lora_weights=meaning)
    assert flatten(config)["init_lora_weights"] == init
    changed = dataclasses.replace(config, method=LoRA(init_lora_weights="gaussian"))
    assert flatten(changed)["init_lora_weights"] == "gaussian"


@pytest.mark.parametrize(("value", "meaning"), [(None, False), (0, False), (1, True), (False, False)])
def test_a_switch_that_is_null_or_a_bit_has_the_truth_that_peft_takes_and_is_kept(value: Any, meaning: bool) -> None:
    config = lora(use_rslora=value)
    assert config.method == LoRA(r=4, lora_alpha=6, use_rslora=meaning)
    assert flatten(config)["use_rslora"] is value


@pytest.mark.parametrize(("init", "meaning"), [("Gaussian", "gaussian"), ("OLoRA", "olora"), (None, False), (0, False), ("", False)])
def test_an_init_is_read_as_peft_reads_it_and_kept(init: Any, meaning: bool | str) -> None:
    config = lora(init_lora_weights=init)
    assert config.method == LoRA(r=4, lora_alpha=6, init_lora_weights=meaning)
    assert flatten(config)["init_lora_weights"] == init


def test_loha_with_a_core_is_a_method_of_its_own() -> None:
    data = {"peft_type": "LOHA", "use_effective_conv2d": True, "r": 4}
    assert from_dict(data).method == LoHaEffective(r=4)
    assert flatten(from_dict(data)) == data
    assert from_dict({"peft_type": "LOHA", "use_effective_conv2d": False}).method == LoHa()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"peft_type": "LORA", "r": 4, "r": 8}'])
def test_what_is_not_json_is_refused_by_name(text: str) -> None:
    with pytest.raises(FileFormatError, match=r"here/adapter_config\.json"):
        parse(text, "here/adapter_config.json")


def test_patterns_change_the_method_module_by_module() -> None:
    config = lora(rank_pattern={"q": 2, r"layers\.[01]\.v": 8}, alpha_pattern={"layers.1.v": 1})
    assert config.method_for("layers.0.q") == LoRA(r=2, lora_alpha=6)
    assert config.method_for("layers.0.v") == LoRA(r=8, lora_alpha=6)
    assert config.method_for("layers.1.v") == LoRA(r=8, lora_alpha=1)
    assert config.method_for("layers.2.v") == LoRA(r=4, lora_alpha=6)
    assert config.method_for("layers.0.xq") == LoRA(r=4, lora_alpha=6)


def test_the_first_pattern_that_matches_wins() -> None:
    assert lora(rank_pattern={"q": 2, "layers.0.q": 3}).method_for("layers.0.q") == LoRA(r=2, lora_alpha=6)
    assert lora(rank_pattern={"layers.0.q": 3, "q": 2}).method_for("layers.0.q") == LoRA(r=3, lora_alpha=6)


def test_ia3_is_feedforward_where_the_modules_say() -> None:
    config = from_dict({"peft_type": "IA3", "feedforward_modules": ["up"], "target_modules": ["q", "up"]})
    assert config.method_for("h.0.up") == IA3(is_feedforward=True)
    assert config.method_for("h.0.q") == IA3()
    pattern = from_dict({"peft_type": "IA3", "feedforward_modules": r".*\.up"})
    assert pattern.method_for("h.up") == IA3(is_feedforward=True)
    assert pattern.method_for("h.up.q") == IA3()
    with pytest.raises(ConfigError, match="feedforward_modules is null"):
        from_dict({"peft_type": "IA3"}).method_for("q")


def test_a_pattern_that_would_never_end_is_stopped() -> None:
    config = lora(rank_pattern={"(a|aa)+$": 2})
    start = time.monotonic()
    with pytest.raises(TargetError, match=r"'\(a\|aa\)\+\$' was still undecided"):
        config.method_for("a" * 60 + "!")
    assert time.monotonic() - start < 5
