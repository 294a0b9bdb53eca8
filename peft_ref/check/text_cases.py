"""The questions about text. Names are chosen to trap: q_proj beside xq_proj, layers.1 beside layers.10, an adapter called "0"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft_ref.check.attending_text import attention_text_cases
from peft_ref.check.case import Case, encode, layer_to_json
from peft_ref.check.init_laws import init_cases
from peft_ref.check.prompt_saved import state_dict_cases
from peft_ref.check.prompt_sizes import config_cases
from peft_ref.check.prompt_starts import prompt_init_cases
from peft_ref.check.variants import dyadic, generator
from peft_ref.files.config import from_dict
from peft_ref.layers import Embedding, Layer, Linear

BLOCK = ("self_attn.q_proj", "self_attn.xq_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
MODULES: tuple[Mapping[str, str], ...] = (
    {"name": "model.embed_tokens", "kind": "embedding", "class": "Embedding"},
    *({"name": f"model.layers.{i}.{part}", "kind": "linear", "class": "Linear"} for i in (0, 1, 2, 10) for part in BLOCK),
    {"name": "model.norm", "kind": "other", "class": "LlamaRMSNorm"},
    {"name": "lm_head", "kind": "linear", "class": "Linear"},
)
MODEL = {"model_type": "llama", "output_head": "lm_head"}

TARGETS: dict[str, Mapping[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "whole-name": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "regex": {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude-list": {"target_modules": ["q_proj", "v_proj", "up_proj"], "exclude_modules": ["up_proj", "model.layers.2.self_attn.q_proj"]},
    "exclude-regex": {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.10\..*"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1, 10]},
    "one-layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "nothing": {"target_modules": ["query"]},
}

CONFIGS: dict[str, dict[str, Mapping[str, Any]]] = {
    "lora": {
        "plain": {"r": 4, "lora_alpha": 6},
        "alpha-missing": {"r": 4},
        "rank-missing": {"lora_alpha": 6},
        "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
        "rank-pattern": {"r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 16, r"layers\.1\..*q_proj": 2}},
        "alpha-pattern": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"q_proj": 20}},
        "both-patterns": {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {"mlp.up_proj": 16, "up_proj": 2},
            "alpha_pattern": {"up_proj": 24, "down_proj": 1},
            "use_rslora": True,
        },
    },
    "dora": {
        "plain": {"r": 4, "lora_alpha": 6, "use_dora": True},
        "alpha-pattern": {"r": 4, "use_dora": True, "alpha_pattern": {"q_proj": 20}},
    },
    "adalora": {
        "plain": {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10},
        "alpha-missing": {"init_r": 4, "target_r": 2, "total_step": 10},
        "alpha-zero": {"init_r": 4, "target_r": 2, "lora_alpha": 0, "total_step": 10},
        "rank-missing": {"lora_alpha": 6, "total_step": 10},
        "rank-pattern": {
            "init_r": 4,
            "lora_alpha": 6,
            "total_step": 10,
            "rank_pattern": {
                "model.layers.1.self_attn.v_proj.lora_E": [True, False, True, False],
                "model.layers.10.mlp.up_proj.lora_E": [False, True, True, True],
            },
        },
        "alpha-pattern": {"init_r": 4, "lora_alpha": 6, "total_step": 10, "alpha_pattern": {"q_proj": 20}},
    },
    "loha": {
        "plain": {"r": 4, "alpha": 6},
        "alpha-missing": {"r": 4},
        "rank-pattern": {"r": 4, "alpha": 6, "rank_pattern": {"v_proj": 16}},
    },
    "hra": {
        "plain": {"r": 4},
        "rank-missing": {},
        "odd-orthogonal": {"r": 5, "apply_GS": True},
    },
    "oft": {
        "plain": {"oft_block_size": 4},
        "block-size-missing": {"num_cayley_neumann_terms": 3},
        "by-number": {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False, "block_share": True},
        "held": {"oft_block_size": 8, "coft": True},
    },
    "road": {
        "small-groups": {"group_size": 2},
        "variant-missing": {"group_size": 4},
        "group-size-missing": {"variant": "road_2"},
        "both": {"variant": "road_4", "group_size": 2},
    },
    "ia3": {"feedforward": {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}},
}
PEFT_TYPE = {"adalora": "ADALORA", "lora": "LORA", "dora": "LORA", "loha": "LOHA", "hra": "HRA", "road": "ROAD", "oft": "OFT", "ia3": "IA3"}


# The clauses in question: of fresh adapters, of configurations, of keys.
CLAUSES = {
    "adalora": ("ADALORA-C30", "ADALORA-C32", "ADALORA-C35"),
    "lora": ("LORA-C25", "LORA-C33", "LORA-C35"),
    "dora": ("DORA-C21", "DORA-C22", "DORA-C23"),
    "loha": ("LOHA-C17", "LOHA-C19", "LOHA-C21"),
    "hra": ("HRA-C19", "HRA-C21", "HRA-C22"),
    "oft": ("OFT-C22", "OFT-C23", "OFT-C25"),
    "road": ("ROAD-C17", "ROAD-C19", "ROAD-C20"),
    "ia3": ("IA3-C18", "IA3-C5", "IA3-C20"),
}
# Of configurations and of keys; every start of a prompt has its own.
PROMPT_CLAUSES = {
    "cartridge": ("CARTRIDGE-C11", "CARTRIDGE-C6"),
    "cpt": ("CPT-C22", "CPT-C11"),
    "multitask_prompt_tuning": ("MULTITASKPROMPTTUNING-C13", "MULTITASKPROMPTTUNING-C7"),
    "p_tuning": ("PTUNING-C19", "PTUNING-C13"),
    "prefix_tuning": ("PREFIXTUNING-C18", "PREFIXTUNING-C20"),
    "prompt_tuning": ("PROMPTTUNING-C17", "PROMPTTUNING-C5"),
}


def text_cases(method: str) -> tuple[Case, ...]:
    """The questions about text and about fresh adapters of a method."""
    if method in PROMPT_CLAUSES:
        sizes, saved = PROMPT_CLAUSES[method]
        return (*prompt_init_cases(method), *config_cases(method, sizes), *state_dict_cases(method, saved))
    if method == "adaption_prompt":
        return tuple(attention_text_cases(method))
    if method not in CLAUSES:
        return ()
    fresh, configs, keys = CLAUSES[method]
    targets = _targets("LORA-C30") if method == "lora" else ()
    return (*init_cases(method, fresh), *targets, *_configs(method, configs), *_state_dicts(method, keys))


def _targets(clause: str) -> Iterator[Case]:
    for name, config in TARGETS.items():
        question = {"modules": [dict(m) for m in MODULES], "config": config, "model": MODEL}
        yield Case(id=f"lora.targets.{name}", method="lora", operation="targets", clause=clause, question=question)


def _configs(method: str, clause: str) -> Iterator[Case]:
    names = [m["name"] for m in MODULES if m["kind"] == "linear" and m["name"] != "lm_head"]
    for name, config in CONFIGS[method].items():
        given = {"peft_type": PEFT_TYPE[method], "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], **config}
        used = [n for n in names if not n.endswith("xq_proj")]
        question = {
            "adapter_config": given,
            "modules": used if method != "ia3" else [n for n in used if n.endswith(("v_proj", "down_proj"))],
        }
        yield Case(id=f"{method}.config.{name}", method=method, operation="config", clause=clause, question=question)


def _state_dicts(method: str, clause: str) -> Iterator[Case]:
    for adapter_name in ("default", "0"):
        config = {"peft_type": PEFT_TYPE[method], **next(iter(CONFIGS[method].values()))}
        parsed = from_dict(config)
        where = f"{method}.state-dict.{adapter_name}"
        rng = generator(where)
        layers: dict[str, Layer] = {
            "model.layers.0.self_attn.v_proj": Linear(in_features=5, out_features=7 if method != "road" else 8),
            "model.layers.1.mlp.down_proj": Linear(in_features=7, out_features=5 if method != "road" else 6),
        }
        if method in ("lora", "dora"):
            layers["model.embed_tokens"] = Embedding(num_embeddings=9, embedding_dim=7)
        modules = []
        for name, layer in layers.items():
            tensors = {s.key: encode(abs(dyadic(rng, s.stored_shape))) for s in parsed.method_for(name).spec(layer)}
            modules.append({"name": name, "layer": layer_to_json(layer), "tensors": tensors})
        question = {"adapter_config": config, "adapter_name": adapter_name, "modules": modules}
        yield Case(id=where, method=method, operation="state_dict", clause=clause, question=question)
