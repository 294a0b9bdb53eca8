"""LoRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.methods.lora import LoRA
from tests.methods.config_words import BIASES, LAYERS, NUMBERS, PATTERNS, SWITCH, TARGETS, flip, pattern, random_word
from tests.methods.facts import Difference, Facts, Tour, ranked

INITS: list[Any] = ["gaussian", "Gaussian", "olora", "OLoRA", "pissa", "PISSA", "pissa_niter_2", "pissa_niter_x", "pissa_x", "orthogonal"]
MORE_INITS: list[Any] = ["Orthogonal", "eva", "lora_ga", "mica", "corda", "loftq", "magic", "", True, False, None, 0, 1]
DILATED = {f"lora.conv1d-dilation.plain.{operation}" for operation in ("forward", "backward")}
COMPUTED = {"lora.linear.init-pissa.init", "lora.linear.init-olora.init"}
EVERY = ["q", "up", "conv1", "conv2", "conv3", "table"]


def lora(**options: Any) -> Any:
    import peft

    return lambda: peft.LoraConfig(**{"r": 4, "target_modules": EVERY, **options})


def as_made(module: Any, method: Any) -> bool:
    return ranked(module, method) and bool(module.use_dora["default"]) == (type(method).__name__ == "DoRA")


def options(rng: Any, common: dict[str, Any]) -> dict[str, Any]:
    """Words that LoRA and DoRA share, at random."""
    layers = {} if isinstance(common["target_modules"], str) else {"layers_to_transform": random_word(rng, None, 1, [0, 1])}
    return {
        **common,
        **layers,
        "r": int(rng.integers(1, 65)),
        "lora_alpha": random_word(rng, 8, 2.5, 1e-7),
        "lora_dropout": float(rng.random()),
        "use_rslora": flip(rng),
        "bias": random_word(rng, "none", "all", "lora_only"),
        "rank_pattern": pattern(rng),
        "alpha_pattern": pattern(rng),
    }


def random_config(rng: Any, common: dict[str, Any]) -> Any:
    return lora(**options(rng, common), lora_bias=flip(rng))()


FACTS = Facts(
    random=random_config,
    # A is built without the layer's dilation; two starts are worked out in float32 and refused in float64
    unable=lambda case, dtype: case in DILATED or (dtype == "float64" and case in COMPUTED),
    settings={
        "lora": LoRA(r=4, lora_alpha=6, init_lora_weights=False),
        "lora-rslora": LoRA(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False),
        "lora-bias": LoRA(r=4, lora_alpha=6, lora_bias=True, init_lora_weights=False),
    },
    crashes=frozenset({"conv2d-dilation"}),  # A is built without the layer's dilation
    fresh={"init_lora_weights": st.sampled_from((True, "gaussian", "orthogonal", "pissa", "olora"))},
    config={"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | PATTERNS
    | {
        "r": NUMBERS,
        "lora_alpha": [*NUMBERS, 0.5, -2.5, 1e-7],
        "lora_dropout": [0.0, 0, 0.1, 0.999, 1, 1.0, 1.5, -0.1, None, "0.1", True],
        "use_rslora": SWITCH,
        "use_dora": SWITCH,
        "lora_bias": SWITCH,
        "fan_in_fan_out": [True, False],
        "bias": BIASES,
        "init_lora_weights": [*INITS, *MORE_INITS],
        "megatron_config": [None, {}, {"a": 1}],
        "target_parameters": [None, [], "q.weight"],
        "use_qalora": [False, None],
        "kasa_config": [None, {}, {"beta": 0.5}, {"beta": -1}, {"delta": 1}, 3, "yes"],
        "use_bdlora": [None, {}, {"match_strict": False}, {"target_modules_bd_a": ["q"], "match_strict": False}, {"nblocks": 2}, 3],
        "velora_config": [None, {}, {"num_groups": 3}, {"num_groups": 0}, {"init_type": "magic"}, {"init_type": "random"}, 3],
        "monteclora_config": [None, {}, {"num_samples": 3, "buffer_size": 2}],
        "loftq_config": [{}, None, {"loftq_bits": 4}],
        "eva_config": [None, {"rho": 2.0}, {"rho": 0.5}, 3],
        "ensure_weight_tying": [False],
        "enable_lora": [None, [True, False, True]],
    },
    made=as_made,
    differences=(
        Difference("we", r"lora_dropout=(1|1\.0|-0\.1): a probability", "PEFT divides by zero at 1, and ignores what is below 0"),
        Difference("we", r"enable_lora=.* is not built yet", "PEFT drops it, and then cannot load the weights, which have other shapes"),
        Difference(
            "we",
            r"init_lora_weights='(magic|pissa_x|pissa_niter_x|PISSA|Orthogonal)' is not built here|'orthogonal' needs an even",
            "PEFT checks a value when a module asks for it, and here none did; a file is wrong all the same",
        ),
        Difference("PEFT", r"preprocess_corda", "it wants the data that the start was made of; so does a model here, a reader does not"),
        Difference("PEFT", r"No module named 'megatron'", "it wants megatron installed where a configuration names it"),
    ),
    tour=Tour("LoraConfig", {"r": 2, "lora_alpha": 5}),
)
