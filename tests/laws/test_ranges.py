"""Which values a hyper-parameter may have. What one name means, it means in every method; the words are those of PEFT's configurations.

Whether PEFT refuses the same is asked live by tests/files/test_config_space.py, where PEFT looks at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from peft_ref.contracts import Method
from peft_ref.errors import ConfigError
from peft_ref.methods import METHODS
from peft_ref.methods.bdlora import BdLoraConfig
from peft_ref.methods.eva_init import Eva
from peft_ref.methods.kasa import KasaConfig
from peft_ref.methods.loftq_init import LoftQ
from peft_ref.methods.lora_ga_init import LoraGA
from peft_ref.methods.monteclora import MontecloraConfig
from peft_ref.methods.velora import VeloraConfig
from peft_ref.ranges import not_negative, one_of, positive, probability, share
from tests.methods import facts

POSITIVE = {
    *("r", "init_r", "mini_r", "u", "num_subspaces", "subspace_rank", "num_vectors", "vector_length", "topk", "theta_d_length"),
    *("n_frequency", "group_size", "gralora_k", "qalora_group_size", "num_samples", "num_groups", "num_ranks", "num_tasks"),
    *("loftq_iter", "nblocks", "total_step", "deltaT", "encoder_hidden_size", "stable_gamma", "adapter_len", "effective_rank"),
    "num_virtual_tokens",
}
NOT_NEGATIVE = ["hybrid_r", "orth_reg_weight", "beta", "gamma", "num_frozen_tokens", "depth"]
SHARES = ["tau", "sparse_rate", "weight_tying", "encoder_dropout"]
OR_ZERO = {("oft", "r"), ("glora", "r"), ("cpt", "num_virtual_tokens")}  # OFT's follows from its other size; CPT counts its tokens
SUBMAPS = (BdLoraConfig, Eva, KasaConfig, LoftQ, LoraGA, MontecloraConfig, VeloraConfig)
FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
OF_SCHEDULE = ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent")
Row = tuple[Any, dict[str, Any], str, Any]


def classes() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for name, cls in METHODS.weights.items():
        yield name, cls, facts(name).required
    for name, other in {**METHODS.prompts, **METHODS.attention}.items():
        yield name, other, {"num_virtual_tokens": 3} if name not in METHODS.attention else {}
    for cls in SUBMAPS:
        yield cls.__name__, cls, {}


def refused() -> Iterator[Row]:
    for name, cls, needed in classes():
        for field in (f.name for f in fields(cls)):
            if (name, field) in OR_ZERO:
                continue
            if field in POSITIVE:
                yield from ((cls, needed, field, value) for value in (0, -1))
            elif field in NOT_NEGATIVE:
                yield cls, needed, field, -1
            elif field in SHARES:
                yield from ((cls, needed, field, value) for value in (-0.01, 1.01))
            elif (field.endswith("_dropout") and getattr(cls, "dropout", None) == field) or field == "sparsity":
                yield from ((cls, needed, field, value) for value in (-0.01, 1))
    yield METHODS.weights["velora"].__dataclass_fields__["velora_config"].default_factory, {}, "scale", 0  # type: ignore[attr-defined]
    yield METHODS.weights["c3a"], {}, "block_size", 0
    yield METHODS.weights["adalora"], {"total_step": 1, "tinit": -5}, "total_step", -1  # although steps would be left
    yield METHODS.weights["glora"], {"config_A_B": "vector", "config_C": "vector"}, "r", -1
    yield METHODS.weights["glora"], {"config_A_B": "vector", "config_C": "lora"}, "r", 0
    yield METHODS.weights["glora"], {"config_A_B": "lora", "config_C": "none"}, "r", 0
    yield METHODS.prompts["p_tuning"], {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM"}, "encoder_num_layers", 0
    yield from ((METHODS.weights["adamss"], {"use_asa": True}, field, 0) for field in OF_SCHEDULE)
    yield Eva, {}, "rho", 0.99
    for series in ({"use_cayley_neumann": True}, {"use_cayley_neumann": True, "cayley_neumann_eps": 0.5}):
        yield from ((METHODS.weights["psoft"], series, "num_cayley_neumann_terms", value) for value in (0, -1))
    yield from ((METHODS.weights["psoft"], {"use_cayley_neumann": True}, "cayley_neumann_eps", value) for value in (0, 0.0, 1, 1.5, -0.5))


def said(value: Any) -> str:
    return getattr(value, "__name__", "") or str(value)


@pytest.mark.parametrize(("cls", "needed", "field", "value"), [*refused()], ids=said)
def test_a_value_out_of_range_is_refused_by_its_name(cls: Any, needed: dict[str, Any], field: str, value: Any) -> None:
    cls(**needed)
    with pytest.raises(ConfigError, match=rf"(^|\b){field}={value}\b"):
        cls(**needed | {field: value})


WORDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "adamss": ("init_weights", ("orthogonal", None, False)),
    "bdlora": ("diagonal", ("", "A", "B")),
    "c3a": ("init_weights", (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")),
    "cpt": ("opt_weighted_loss_type", ("none", "decay")),
    "deft": ("decomposition_method", ("relu", "qr")),
    "hira": ("init_weights", (True, False, "gaussian")),
    "lokr": ("init_weights", (True, False, "lycoris")),
    "miss": ("init_weights", (True, False)),
    "multitask_prompt_tuning": (
        "prompt_tuning_init",
        ("RANDOM", "SAMPLE_VOCAB", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"),
    ),
    "p_tuning": ("encoder_reparameterization_type", ("MLP", "LSTM")),
    "peanut": ("act_fn", ("relu", "gelu", "silu", "tanh", "sigmoid")),
    "prompt_tuning": ("prompt_tuning_init", ("RANDOM", "SAMPLE_VOCAB")),
    "psoft": ("ab_svd_init", ("psoft_init", "pissa_init")),
    "psoft ": ("psoft_svd", ("full", "lowrank")),
    "road": ("variant", ("road_1", "road_2", "road_4")),
    "tinylora": ("init_weights", (True, False, "uniform")),
    "glora": ("config_A_B", ("lora", "vector", "constant", "none")),
    "glora ": ("config_C", ("lora", "vector", "none")),
    "glora  ": ("config_D_E", ("vector", "constant", "none")),
    "LoraGA": ("direction", ("ArB2r", "A2rBr", "ArBr", "random")),
    "LoraGA ": ("scale", ("stable", "weight_svd", "gd_scale", "unit")),
    "VeloraConfig": ("init_type", ("batch_average", "batch_average_once", "random")),
}


@pytest.mark.parametrize("name", WORDS)
def test_the_words_of_peft_are_taken_and_no_others(name: str) -> None:
    field, words = WORDS[name]
    cls, needed = {n: (cls, needed) for n, cls, needed in classes()}[name.strip()]
    assert [getattr(cls(**needed | {field: word}), field) for word in words] == list(words)
    for other in ("magic", "XX", 1, 0, *({True, False, None} - {*words})):
        with pytest.raises(ConfigError, match=f"{field}={other!r} is not known"):
            cls(**needed | {field: other})


def test_a_rank_of_zero_is_taken_where_nothing_is_of_a_rank() -> None:
    assert METHODS.weights["glora"](config_A_B="vector", config_C="none", r=0).r == 0  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("check", "taken", "beyond"),
    [
        (positive, (1, 0.001, None), (0, -1, float("nan"))),
        (not_negative, (0, 0.0, 2), (-1, -0.001, float("nan"))),
        (probability, (0, 0.0, 0.999), (1, 1.0, -0.001, float("nan"))),
        (share, (0, 0.5, 1, 1.0), (-0.001, 1.001, float("nan"))),
        (lambda given, name: one_of(given, name, True, "on"), (True, "on"), (1, False, "off", None)),
    ],
)
def test_the_ends_of_a_range(check: Any, taken: tuple[Any, ...], beyond: tuple[Any, ...]) -> None:
    for value in taken:
        check(SimpleNamespace(word=value), "word")
    for value in beyond:
        with pytest.raises(ConfigError, match=r"^word="):
            check(SimpleNamespace(word=value), "word")


def test_there_is_a_method_of_every_name() -> None:
    there = {field.name for _, cls, _ in classes() for field in fields(cls)}
    assert {*POSITIVE, *NOT_NEGATIVE, *SHARES, *OF_SCHEDULE} <= there
    assert {cls for _, cls, _ in classes() if isinstance(cls, type) and issubclass(cls, Method)} >= {*METHODS.weights.values()}
