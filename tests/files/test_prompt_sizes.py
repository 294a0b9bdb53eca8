"""The sizes that a prompt takes from a model are PEFT's, over the configurations of transformers' models, which need no weights."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.utils.other import _prepare_prompt_learning_config  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

from peft_ref.errors import ConfigError  # noqa: E402
from peft_ref.files.config import from_dict  # noqa: E402
from peft_ref.methods import PrefixTuning, PromptTuning  # noqa: E402
from peft_ref.sizes import LAYERS_COMPUTED  # noqa: E402
from tests.files.prompt_models import MODELS, ONLY, PAIRS, PROMPTS, base  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.usefixtures("quiet")]
SIZES = ("num_layers", "token_dim", "num_attention_heads", "encoder_hidden_size")
# Of these every size has to be found that PEFT finds; of all others what is found has to be right.
TEXT = (
    *(
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gptj",
        "gpt_neo",
        "gpt_neox",
        "gpt_bigcode",
    ),
    *("opt", "bloom", "falcon", "phi", "phi3", "mpt", "codegen", "stablelm", "t5", "mt5", "longt5", "bart", "mbart", "pegasus", "marian"),
    *("m2m_100", "blenderbot", "bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2", "distilbert", "albert", "whisper"),
    *("gemma3", "llava", "mllama", "qwen2_vl", "dbrx", "fsmt", "led", "cohere", "olmo2", "granite", "smollm3", "starcoder2"),
)
# Where PEFT finds no number of layers and we do: the file's name for an encoder's, which PEFT asks only the model's class for.
ONLY_HERE = {
    "d_fine",
    "deformable_detr",
    "deimv2",
    "florence2",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "pp_formulanet",
} | {
    "rt_detr",
    "rt_detr_v2",
}


@cache
def made() -> dict[str, Any]:
    """Every model's configuration that can be made without arguments."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    found = {}
    for name in CONFIG_MAPPING:
        try:
            found[name] = CONFIG_MAPPING[name]()
        except Exception:  # some want parts
            continue
    return found


def theirs(data: dict[str, Any], model: Any) -> dict[str, Any] | str:
    config = peft.PeftConfig.from_peft_type(**data)
    try:
        sized = _prepare_prompt_learning_config(config, model)
    except (ValueError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return {name: getattr(sized, name) for name in SIZES if name in type(config).__dataclass_fields__}


def ours(data: dict[str, Any], model: Any) -> dict[str, Any] | str:
    try:
        sized: Any = from_dict(data).method.sized(model if isinstance(model, dict) else model.to_dict(), None)  # type: ignore[attr-defined]
    except ConfigError as error:
        return str(error)
    return {name: getattr(sized, name) for name in SIZES if hasattr(sized, name)}


def random_given(rng: np.random.Generator) -> dict[str, int]:
    every = {"num_layers": 3, "token_dim": 240, "num_attention_heads": 2, "encoder_hidden_size": 7}
    return {name: value for name, value in every.items() if rng.integers(3) == 0}


def test_what_is_found_in_any_model_is_pefts() -> None:
    rng = np.random.default_rng(3)
    assert len(made()) > 300
    only_here, found = set(), 0
    for name, model in made().items():
        for kind in ("PREFIX_TUNING", "P_TUNING"):
            data = {"peft_type": kind, "num_virtual_tokens": 2, **(random_given(rng) if rng.integers(2) else {})}
            peft_says, we_say = theirs(data, model), ours(data, model)
            if isinstance(we_say, str):
                assert "\n  Give " in we_say or ": a positive number" in we_say
                continue
            found += 1
            if isinstance(peft_says, str):
                only_here.add(name)
            else:
                assert we_say == peft_says, (name, data)
    assert found > 700
    assert only_here <= ONLY_HERE


@pytest.mark.parametrize("name", TEXT)
def test_every_size_of_a_language_model_is_found(name: str) -> None:
    if name not in made():
        pytest.skip(f"this transformers has no {name}")
    rng = np.random.default_rng(4)
    for kind in PROMPTS:
        for given in ({}, random_given(rng), {"token_dim": 240, "num_attention_heads": 3}):
            own = {key: value for key, value in given.items() if key != "encoder_hidden_size" or kind in ("PREFIX_TUNING", "P_TUNING")}
            data = {"peft_type": kind, "num_virtual_tokens": 2, "task_type": ONLY.get(kind), **own}
            we_say, peft_says = ours(data, made()[name]), theirs(data, made()[name])
            if isinstance(we_say, str):  # as of mpt, whose words for its sizes PEFT does not know either
                assert isinstance(peft_says, str), (data, we_say)
            else:
                assert we_say == peft_says, data


def test_heads_of_keys_and_values_are_pefts_wherever_a_model_says_them() -> None:
    """In one place, in another for its global layers, or layer by layer."""
    rng = np.random.default_rng(6)

    def some(**words: Any) -> dict[str, Any]:
        return {name: value for name, value in words.items() if rng.integers(2)}

    def size() -> int:
        return int(rng.integers(1, 9))

    for _ in range(300):
        model = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "num_key_value_heads": size()}
        layers = {str(i): some(head_dim=size(), num_key_value_heads=size()) for i in range(rng.integers(1, 4))}
        model |= some(head_dim=size(), global_head_dim=size(), num_global_key_value_heads=size(), per_layer_config=layers)
        data = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, **some(token_dim=48), **some(num_attention_heads=2)}
        assert ours(data, model) == theirs(data, model), (data, model)


@pytest.mark.parametrize("name", LAYERS_COMPUTED)
def test_layers_that_a_class_computes_are_asked_for(name: str) -> None:
    """PEFT sees the class; whoever has only config.json would take another number."""
    if name not in made():
        pytest.skip(f"this transformers has no {name}")
    model = made()[name]
    named = [model.to_dict().get(key) for key in ("num_hidden_layers", "num_layers", "encoder_layers")]
    assert model.num_hidden_layers != next(value for value in named if value is not None)
    with pytest.raises(ConfigError, match=rf"(?s)the layers of a {name} are not those of its config.json.*Give num_layers"):
        PromptTuning(num_virtual_tokens=2, token_dim=8, num_attention_heads=2).sized(model.to_dict())


@pytest.mark.parametrize("task", MODELS)
def test_an_encoder_decoder_task_has_two_submodules_and_no_other(task: str) -> None:
    for kind in (kind for kind, of in PAIRS if of == task):
        data = {"peft_type": kind, "task_type": task, "num_virtual_tokens": 2}
        model = base(task)
        sized: Any = from_dict(data).method.sized(model.config.to_dict(), task)  # type: ignore[attr-defined]
        wrapped = peft.get_peft_model(model, peft.PeftConfig.from_peft_type(**data))
        assert sized.num_transformer_submodules == wrapped.active_peft_config.num_transformer_submodules


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "token_dim is not given, and the model's config has none of hidden_size, n_embd, d_model.\n  Give token_dim."),
        ({"hidden_size": 8}, "num_attention_heads is not given, and the model's config has none of"),
        ({"hidden_size": 8, "num_attention_heads": [2, 4]}, r"num_attention_heads of the model's config is no number: \[2, 4\]"),
        ({"hidden_size": 8, "n_head": 2, "num_layers": {"a": 1}}, "num_layers of the model's config is no number"),
        (
            {"hidden_size": 8, "n_head": 2, "num_layers": 3, "num_key_value_heads": None},
            "num_key_value_heads of the model's config is no n",
        ),
    ],
)
def test_what_a_model_does_not_say_is_asked_for(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrefixTuning(num_virtual_tokens=2).sized(model)
