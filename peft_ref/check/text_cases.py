"""The questions about text. Names are chosen to trap: q_proj beside xq_proj, layers.1 beside layers.10, an adapter called "0"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft_ref.check.asked import Files
from peft_ref.check.attending_text import attention_text_cases
from peft_ref.check.case import Case, encode, layer_to_json
from peft_ref.check.init_laws import init_cases
from peft_ref.check.mistakes import SUITES
from peft_ref.check.prompt_saved import state_dict_cases
from peft_ref.check.prompt_sizes import config_cases
from peft_ref.check.prompt_starts import prompt_init_cases
from peft_ref.check.variants import dyadic, generator, places_of
from peft_ref.contracts import WeightMethod
from peft_ref.files.adapter import spanned
from peft_ref.files.config import from_dict
from peft_ref.methods import METHODS

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
    suite = SUITES[method]
    fresh = () if suite.fresh is None else init_cases(method, suite.fresh)
    targets = _targets("LORA-C30") if method == "lora" else ()
    return (*fresh, *targets, *(() if suite.files is None else (*_configs(method, suite.files), *_state_dicts(method, suite.files))))


def _targets(clause: str) -> Iterator[Case]:
    for name, config in TARGETS.items():
        question = {"modules": [dict(m) for m in MODULES], "config": config, "model": MODEL}
        yield Case(id=f"lora.targets.{name}", method="lora", operation="targets", clause=clause, question=question)


def _configs(method: str, files: Files) -> Iterator[Case]:
    names = [m["name"] for m in MODULES if m["kind"] == "linear" and m["name"] != "lm_head"]
    asked = [n for n in names if n.rpartition(".")[2] in files.modules]
    for name, config in files.configs.items():
        given = {"peft_type": METHODS[method].peft_type, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], **config}
        question = {"adapter_config": given, "modules": asked}
        yield Case(id=f"{method}.config.{name}", method=method, operation="config", clause=files.configs_clause, question=question)


def _state_dicts(method: str, files: Files) -> Iterator[Case]:
    for adapter_name in ("default", "0"):
        config = {"peft_type": METHODS[method].peft_type, **next(iter(files.configs.values()))}
        parsed = spanned(from_dict(config), files.saved_on, {})
        together: dict[str, Any] = {}
        where = f"{method}.state-dict.{adapter_name}"
        assert isinstance(parsed.method, WeightMethod)
        rng, keys = generator(where), parsed.method.shared_keys(tuple(files.saved_on))
        modules = []
        for name, layer in files.saved_on.items():
            specs = parsed.method_for(name).spec(layer)
            shared = {s.key: keys[name][s.field] for s in specs if s.shared}
            tensors = {s.key: encode(abs(dyadic(rng, s.stored_shape))) for s in specs if shared.get(s.key) not in together}
            tensors |= {key: encode(places) for key, places in places_of(parsed.method_for(name), layer, rng).items()}
            together |= {place: tensors[key] for key, place in shared.items() if key in tensors}
            tensors |= {key: together[place] for key, place in shared.items()}
            modules.append({"name": name, "layer": layer_to_json(layer), "tensors": tensors})
        question = {"adapter_config": config, "adapter_name": adapter_name, "modules": modules}
        yield Case(id=where, method=method, operation="state_dict", clause=files.keys_clause, question=question)
