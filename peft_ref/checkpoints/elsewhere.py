"""What other programs make of an adapter folder, told from its header: RULES is everything that is known here, each rule with its source.

    refuses    the program stops with an error
    differs    it loads, and computes something else than HF PEFT
    needs      it loads with an option, or with something else at hand

A rule was read in the program's source at the commit that its source names; another version may have other rules. Not looked into, because
no source that was read says it: which modules of an architecture vLLM and llama.cpp know, and what llama.cpp makes of a tied head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from peft_ref.checkpoints.folding import folded
from peft_ref.checkpoints.inspecting import Inspection, Module, listed
from peft_ref.checkpoints.scales import rank_of
from peft_ref.contracts import LowRank
from peft_ref.errors import ConfigError, PeftRefError
from peft_ref.methods.lora import LoRA
from peft_ref.model.converting import CHANGING

Outcome: TypeAlias = Literal["refuses", "differs", "needs"]
VLLM, LLAMA_CPP, MLX = "vllm", "llama.cpp", "mlx"
PROGRAMS = (VLLM, LLAMA_CPP, MLX)
LARGEST_RANK, USUAL_RANK = 512, 16  # vLLM's max_lora_rank: the largest that it may be set to, and what it is


class Source(NamedTuple):
    repository: str
    path: str
    commit: str

    @property
    def url(self) -> str:
        return f"https://github.com/{self.repository}/blob/{self.commit}/{self.path}"

    def __str__(self) -> str:
        return f"{self.repository} {self.path} at {self.commit[:7]}"


class Rule(NamedTuple):
    program: str
    name: str
    outcome: Outcome
    said: str
    source: Source
    broken_by: Callable[[Inspection], Sequence[str]]  # what in the folder breaks it, folded; nothing where it is kept


@dataclass(frozen=True, kw_only=True)
class Verdict:
    rule: Rule
    by: tuple[str, ...]

    @property
    def bad(self) -> bool:
        return self.rule.outcome != "needs"


def verdicts(inspection: Inspection, program: str) -> tuple[Verdict, ...]:
    """The rules of a program that the folder breaks."""
    if program not in PROGRAMS:
        raise ConfigError(f"{program!r} is not known here.\n  There are {', '.join(PROGRAMS)}.")
    found = ((rule, tuple(rule.broken_by(inspection))) for rule in RULES if rule.program == program)
    return tuple(Verdict(rule=rule, by=by) for rule, by in found if by)


# ---- what rules ask


def _on(*words: str) -> Callable[[Inspection], Sequence[str]]:
    """Words of adapter_config.json that are set to something."""
    return lambda inspection: [f"{word}={inspection.flat[word]!r:.60}" for word in words if inspection.flat.get(word)]


def _missing(*words: str) -> Callable[[Inspection], Sequence[str]]:
    return lambda inspection: [f"{word} is not in adapter_config.json" for word in words if word not in inspection.flat]


def _nameless(inspection: Inspection) -> Sequence[str]:
    return [] if inspection.flat.get("base_model_name_or_path") else ["base_model_name_or_path names none"]


def _bias(inspection: Inspection) -> Sequence[str]:
    bias = inspection.flat.get("bias", "none")
    return [] if bias == "none" else [f"bias={bias!r}"]


def _keys_without(*endings: str) -> Callable[[Inspection], Sequence[str]]:
    """Keys of the file that end otherwise."""
    return lambda inspection: folded(key for key in inspection.file.entries if not f".{key}".endswith(endings))


def _unexpected_in_llama_cpp(inspection: Inspection) -> Sequence[str]:
    factors = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    others = ("_layernorm", ".norm", ".base_layer.weight")
    return folded(key for key in inspection.file.entries if not any(part in key for part in (*factors, *others)))


def _rank_above(limit: int) -> Callable[[Inspection], Sequence[str]]:
    def above(inspection: Inspection) -> Sequence[str]:
        r = inspection.flat.get("r")
        return [f"r={r}"] if isinstance(r, int) and r > limit else []

    return above


def _other_scale(theirs: Callable[[Mapping[str, Any], Module], float]) -> Callable[[Inspection], Sequence[str]]:
    """Modules whose scale is another one there, with both."""

    def other(inspection: Inspection) -> Sequence[str]:
        kinds: dict[str, list[str]] = {}
        for name, module in inspection.modules.items():
            if module.scale is None or not _plain(module) or not {"r", "lora_alpha"} <= inspection.flat.keys():
                continue
            scale = theirs(inspection.flat, module)
            if not math.isclose(scale, module.scale.value, rel_tol=1e-6):
                kinds.setdefault(f"{scale:.6g} instead of {module.scale.value:.6g}", []).append(name)
        return [f"{listed(folded(names))}: {what}" for what, names in kinds.items()]

    return other


def _scale_of_vllm(config: Mapping[str, Any], module: Module) -> float:
    """One for all modules: patterns are not read."""
    return float(config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]))


def _scale_of_llama_cpp(config: Mapping[str, Any], module: Module) -> float:
    """alpha over the tensor's own rank; an alpha of 0 counts as none."""
    return float(config["lora_alpha"] / (rank_of(module.method) or 1)) if config["lora_alpha"] else 1.0


def _not_plain(inspection: Inspection) -> Sequence[str]:
    """Modules whose tensors have the names of LoRA's and another meaning."""
    if not inspection.modules:
        return []
    first: dict[Any, bool] = {}
    astray = []
    for name, module in inspection.modules.items():
        like = (module.method, module.layer)
        if like not in first:
            first[like] = _lora_named(module) and not _plain(module)
        astray += [name] if first[like] else []
    return [f"{inspection.method} on {listed(folded(astray))}"] if astray else []


def _lora_named(module: Module) -> bool:
    return module.tensors.keys() <= {"lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"}


def _plain(module: Module) -> bool:
    """Whether B A of the tensors as they are stored, times the scale, is what the adapter adds: tried with numbers of its shapes."""
    method, layer = module.method, module.layer
    if isinstance(method, LoRA):
        return True
    if not isinstance(method, LowRank) or layer is None or module.scale is None or not _lora_named(module):
        return False
    rng = np.random.default_rng(0)
    try:
        own = {key: rng.normal(size=entry.shape) for key, entry in module.tensors.items()}
        f = method.factors(method.unpack(layer, own, own=True))
    except (PeftRefError, TypeError):
        return False
    A, B = (next((value for key, value in own.items() if letter in key), np.zeros(0)) for letter in "AB")
    return f.A.shape == A.shape and f.B.shape == B.shape and bool(np.allclose(f.A, A) and np.allclose(f.B, module.scale.value * B))


def _changed_base(inspection: Inspection) -> Sequence[str]:
    init = inspection.flat.get("init_lora_weights") if inspection.config.method.peft_type == "LORA" else None
    return [f"init_lora_weights={init!r}"] if str(init).lower().startswith(CHANGING) else []


def _not_matrices(inspection: Inspection) -> Sequence[str]:
    """Adapted modules whose factors have more axes than a matrix."""
    return folded(name for name, m in inspection.modules.items() if any(len(entry.shape) > 2 for entry in m.tensors.values()))


def _not_pairs(inspection: Inspection) -> Sequence[str]:
    """Modules whose A and B do not meet as llama.cpp's converter asks of them."""
    return folded(name for name, m in inspection.modules.items() if _lora_named(m) and not _meet(m))


def _meet(module: Module) -> bool:
    A, B = ([e.shape for key, e in module.tensors.items() if f"_{letter}" in key] for letter in "AB")
    return len(A) == len(B) == 1 and len(A[0]) == len(B[0]) > 1 and A[0][-2] == B[0][-1]


def _several(inspection: Inspection) -> Sequence[str]:
    """More than one pair of rank and scale."""
    pairs: dict[tuple[Any, Any], list[str]] = {}
    for name, module in inspection.modules.items():
        pairs.setdefault((module.rank, None if module.scale is None else module.scale.value), []).append(name)
    told = [
        f"rank {rank} and scale {scale:.6g} at {listed(folded(names), 1)}" for (rank, scale), names in pairs.items() if scale is not None
    ]
    return told if len(told) > 1 else []


def _not_lora_or_dora(inspection: Inspection) -> Sequence[str]:
    known = inspection.config.method.peft_type == "LORA" and type(inspection.config.method).flag in (None, "use_dora")
    return [] if known else [inspection.method]


def _always(what: str) -> Callable[[Inspection], Sequence[str]]:
    return lambda inspection: [what]


# ---- the rules

_HELPER = Source("vllm-project/vllm", "vllm/lora/peft_helper.py", "e745bafffc44744aa601169f8c6f325e47ca7cd5")
_NAMES = Source("vllm-project/vllm", "vllm/lora/utils.py", "0fd157078c53638b7ffc9ce7f2c8b8d7ef7a7d28")
_OPTIONS = Source("vllm-project/vllm", "vllm/config/lora.py", "01230b40128e570a58e54e75f7e55c4d5cd9246d")
_WEIGHTS = Source("vllm-project/vllm", "vllm/lora/lora_weights.py", "4c78406e054e0871688c256cfcc754bd631b508e")
_CONVERTER = Source("ggml-org/llama.cpp", "convert_lora_to_gguf.py", "0b03adaa632b76c7651dd1f6fa3b7a0b5eda479c")
_SCALE = Source("ggml-org/llama.cpp", "src/llama-adapter.h", "215841fc0178de0797d23f1cae8ab8ee1baa8eb9")
_LOADER = Source("ml-explore/mlx-lm", "mlx_lm/tuner/utils.py", "036728670ef951c1d583689ad2255020702dcfa3")
_LAYERS = Source("ml-explore/mlx-lm", "mlx_lm/tuner/lora.py", "200af25dd5b26d1711317970fe44b5acf365faab")

_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_TABLES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # saved with an adapter, and passed over

RULES: tuple[Rule, ...] = (
    Rule(
        VLLM,
        "words",
        "refuses",
        "adapter_config.json must say r, lora_alpha and target_modules.",
        _HELPER,
        _missing("r", "lora_alpha", "target_modules"),
    ),
    Rule(VLLM, "modules_to_save", "refuses", "modules_to_save must be null.", _HELPER, _on("modules_to_save")),
    Rule(VLLM, "dora", "refuses", "DoRA is not supported.", _HELPER, _on("use_dora")),
    Rule(VLLM, "bias", "refuses", "bias must be 'none'.", _HELPER, _bias),
    Rule(
        VLLM,
        "tensors",
        "refuses",
        "Every tensor must be a lora_A or lora_B (or the saved base table of embed_tokens or lm_head).",
        _NAMES,
        _keys_without(*_FACTORS, *_TABLES),
    ),
    Rule(VLLM, "convolutions", "refuses", "Only linear layers and embeddings take an adapter.", _NAMES, _not_matrices),
    Rule(VLLM, "largest-rank", "refuses", f"max_lora_rank can be set to {LARGEST_RANK} at most.", _OPTIONS, _rank_above(LARGEST_RANK)),
    Rule(
        VLLM, "usual-rank", "needs", f"max_lora_rank is {USUAL_RANK} unless it is set: --max-lora-rank.", _OPTIONS, _rank_above(USUAL_RANK)
    ),
    Rule(
        VLLM,
        "scale",
        "differs",
        "One scale counts for all modules, from r, lora_alpha and use_rslora: patterns are not read.",
        _WEIGHTS,
        _other_scale(_scale_of_vllm),
    ),
    Rule(VLLM, "variant", "differs", "The factors are multiplied as they are stored: the variant's word is not read.", _HELPER, _not_plain),
    Rule(
        VLLM,
        "changed-base",
        "differs",
        "init_lora_weights is not read: the base is not changed as this start changed it.",
        _HELPER,
        _changed_base,
    ),
    Rule(
        VLLM, "replication", "differs", "layer_replication is not read: layers have the base's numbers.", _HELPER, _on("layer_replication")
    ),
    Rule(
        LLAMA_CPP,
        "tensors",
        "refuses",
        "Every tensor must be a lora_A or lora_B; only norms are kept beside them.",
        _CONVERTER,
        _unexpected_in_llama_cpp,
    ),
    Rule(LLAMA_CPP, "words", "refuses", "adapter_config.json must say lora_alpha.", _CONVERTER, _missing("lora_alpha")),
    Rule(
        LLAMA_CPP, "pairs", "refuses", "A and B must have as many axes, and the last of B be the last but one of A.", _CONVERTER, _not_pairs
    ),
    Rule(
        LLAMA_CPP,
        "base",
        "needs",
        "The base's configuration is needed: --base, where adapter_config.json does not name the base.",
        _CONVERTER,
        _nameless,
    ),
    Rule(
        LLAMA_CPP,
        "scale",
        "differs",
        "The scale is lora_alpha over the rank of each tensor: use_rslora and alpha_pattern are not read, an alpha of 0 means 1.",
        _SCALE,
        _other_scale(_scale_of_llama_cpp),
    ),
    Rule(
        LLAMA_CPP,
        "variant",
        "differs",
        "The factors are multiplied as they are stored: the variant's word is not read.",
        _CONVERTER,
        _not_plain,
    ),
    Rule(
        LLAMA_CPP,
        "changed-base",
        "differs",
        "init_lora_weights is not read: the base is not changed as this start changed it.",
        _CONVERTER,
        _changed_base,
    ),
    Rule(
        LLAMA_CPP,
        "replication",
        "differs",
        "layer_replication is not read: layers have the base's numbers.",
        _CONVERTER,
        _on("layer_replication"),
    ),
    Rule(
        MLX,
        "words",
        "refuses",
        "adapter_config.json must say num_layers and lora_parameters, which are mlx-lm's own words.",
        _LOADER,
        _missing("num_layers", "lora_parameters"),
    ),
    Rule(MLX, "file", "refuses", "The tensors must be in adapters.safetensors.", _LOADER, _always("adapter_model.safetensors")),
    Rule(
        MLX,
        "names",
        "differs",
        "Names are the model's own, and end in lora_a and lora_b; any other is passed over in silence.",
        _LOADER,
        _keys_without("lora_a", "lora_b"),
    ),
    Rule(
        MLX,
        "axes",
        "differs",
        "lora_a is (in, r) and lora_b (r, out): both are the transposes of PEFT's.",
        _LAYERS,
        lambda i: folded(n for n, m in i.modules.items() if _lora_named(m)),
    ),
    Rule(MLX, "one-scale", "refuses", "One rank and one scale count for all modules: no conversion can keep these.", _LOADER, _several),
    Rule(MLX, "kinds", "refuses", "Linear layers, switch layers and embeddings take an adapter, no convolution.", _LOADER, _not_matrices),
    Rule(MLX, "method", "refuses", "There are LoRA, DoRA and full weights.", _LOADER, _not_lora_or_dora),
)
