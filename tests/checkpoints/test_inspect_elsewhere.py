"""What is said of other programs: a folder for every rule that breaks it, and one that breaks none of vLLM's and llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref.checkpoints.elsewhere import LLAMA_CPP, MLX, RULES, VLLM, Rule, verdicts
from peft_ref.checkpoints.inspecting import inspect
from peft_ref.errors import ConfigError
from peft_ref.files.adapter import save_tensors
from peft_ref.files.config import from_dict

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "somebody/something",
    "bias": "none",
}
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "match_strict": True}


def pair(name: str, r: int = 8, size: int = 12) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"lora_A": (r, size), "lora_B": (size, r)}
    return {f"base_model.model.{name}.{key}.weight": rng.normal(size=shape).astype("f4") for key, shape in shapes.items()}


def beside(key: str, *shape: int) -> dict[str, Any]:
    return {f"base_model.model.{key}": np.ones(shape, "f4")}


BOTH = {**pair(Q), **pair(V)}
CONV = {
    "base_model.model.q_proj.lora_A.weight": np.ones((8, 3, 3, 3), "f4"),
    "base_model.model.q_proj.lora_B.weight": np.ones((5, 8, 1, 1), "f4"),
}
BLOCK_DIAGONAL = {
    **BOTH,
    f"base_model.model.{Q}.lora_A.weight": np.ones((8, 6), "f4"),
    f"base_model.model.{V}.lora_B.weight": np.ones((12, 4), "f4"),
}
DORA = BOTH | beside(f"{Q}.lora_magnitude_vector", 12) | beside(f"{V}.lora_magnitude_vector", 12)
HEAD = BOTH | beside("score.weight", 2, 12)
BIASED = BOTH | beside(f"{Q}.base_layer.bias", 12)
IA3 = {f"base_model.model.{Q}.ia3_l": np.ones((12, 1), "f4")}
IA3_CONFIG = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
LARGE = {**pair(Q, 520, 600), **pair(V, 520, 600)}

Folder = tuple[Mapping[str, Any], Mapping[str, Any]]
BREAKING: dict[tuple[str, str], Folder] = {
    (VLLM, "words"): (IA3_CONFIG, IA3),
    (VLLM, "modules_to_save"): ({**PLAIN, "modules_to_save": ["score"]}, HEAD),
    (VLLM, "dora"): ({**PLAIN, "use_dora": True}, DORA),
    (VLLM, "bias"): ({**PLAIN, "bias": "lora_only"}, BIASED),
    (VLLM, "tensors"): ({**PLAIN, "bias": "lora_only"}, BIASED),
    (VLLM, "convolutions"): (PLAIN, CONV),
    (VLLM, "largest-rank"): ({**PLAIN, "r": 520}, LARGE),
    (VLLM, "usual-rank"): ({**PLAIN, "r": 32}, {**pair(Q, 32, 40), **pair(V, 32, 40)}),
    (VLLM, "scale"): ({**PLAIN, "alpha_pattern": {"v_proj": 4}}, BOTH),
    (VLLM, "variant"): ({**PLAIN, "use_bdlora": BLOCKS}, BLOCK_DIAGONAL),
    (VLLM, "changed-base"): ({**PLAIN, "init_lora_weights": "pissa_niter_4"}, BOTH),
    (VLLM, "replication"): ({**PLAIN, "layer_replication": [[0, 1], [0, 1]]}, BOTH),
    (LLAMA_CPP, "tensors"): ({**PLAIN, "modules_to_save": ["score"]}, HEAD),
    (LLAMA_CPP, "words"): (IA3_CONFIG, IA3),
    (LLAMA_CPP, "pairs"): (PLAIN, CONV),
    (LLAMA_CPP, "base"): ({key: value for key, value in PLAIN.items() if key != "base_model_name_or_path"}, BOTH),
    (LLAMA_CPP, "scale"): ({**PLAIN, "use_rslora": True}, BOTH),
    (LLAMA_CPP, "variant"): ({**PLAIN, "use_bdlora": BLOCKS}, BLOCK_DIAGONAL),
    (LLAMA_CPP, "changed-base"): ({**PLAIN, "init_lora_weights": "olora"}, BOTH),
    (LLAMA_CPP, "replication"): ({**PLAIN, "layer_replication": [[0, 1], [0, 1]]}, BOTH),
    (MLX, "words"): (PLAIN, BOTH),
    (MLX, "file"): (PLAIN, BOTH),
    (MLX, "names"): (PLAIN, BOTH),
    (MLX, "axes"): (PLAIN, BOTH),
    (MLX, "one-scale"): ({**PLAIN, "rank_pattern": {"v_proj": 4}}, {**pair(Q), **pair(V, 4)}),
    (MLX, "kinds"): (PLAIN, CONV),
    (MLX, "method"): (IA3_CONFIG, IA3),
}


def broken(tmp_path: Path, folder: Folder, program: str) -> dict[str, tuple[str, ...]]:
    save_tensors(tmp_path, from_dict(folder[0]), folder[1], {"format": "pt"})
    return {v.rule.name: v.by for v in verdicts(inspect(tmp_path), program)}


def identity(rule: Rule) -> str:
    return f"{rule.program}-{rule.name}"


@pytest.mark.parametrize("rule", RULES, ids=identity)
def test_a_folder_that_breaks_a_rule_is_told_so(tmp_path: Path, rule: Rule) -> None:
    assert broken(tmp_path, BREAKING[rule.program, rule.name], rule.program)[rule.name]


OF_ALL_PEFT_FOLDERS = {(MLX, name) for name in ("words", "file", "names", "axes")}


@pytest.mark.parametrize("rule", [r for r in RULES if (r.program, r.name) not in OF_ALL_PEFT_FOLDERS], ids=identity)
def test_a_plain_lora_breaks_no_rule(tmp_path: Path, rule: Rule) -> None:
    assert rule.name not in broken(tmp_path, (PLAIN, BOTH), rule.program)


def test_the_rules_have_names_of_their_own() -> None:
    assert len({(rule.program, rule.name) for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=identity)
def test_a_rule_says_which_commit_it_was_read_at(rule: Rule) -> None:
    assert len(rule.source.commit) == 40
    assert set(rule.source.commit) <= set("0123456789abcdef")
    assert rule.source.url.startswith("https://github.com/")


SCALES: list[tuple[str, dict[str, Any], dict[str, Any], str | None]] = [
    (VLLM, {"use_rslora": True}, BOTH, None),  # it is read
    (VLLM, {"rank_pattern": {"v_proj": 4}}, {**pair(Q), **pair(V, 4)}, "2 instead of 4"),
    (VLLM, {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 8}}, {**pair(Q), **pair(V, 4)}, None),  # the same scale
    (LLAMA_CPP, {"rank_pattern": {"v_proj": 4}}, {**pair(Q), **pair(V, 4)}, None),  # the rank is the tensor's own
    (LLAMA_CPP, {"alpha_pattern": {"v_proj": 4}}, BOTH, "2 instead of 0.5"),
    (LLAMA_CPP, {"use_rslora": True}, BOTH, "2 instead of 5.65685"),
    (LLAMA_CPP, {"lora_alpha": 0}, BOTH, "1 instead of 0"),
]


@pytest.mark.parametrize(("program", "changes", "tensors", "expected"), SCALES)
def test_another_scale_is_told_with_both(
    tmp_path: Path, program: str, changes: dict[str, Any], tensors: dict[str, Any], expected: str | None
) -> None:
    by = broken(tmp_path, ({**PLAIN, **changes}, tensors), program).get("scale", ())
    assert [text.rpartition(": ")[2] for text in by] == ([expected] if expected else [])


VARIANTS: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({"init_lora_weights": "mica"}, BOTH, False),  # a start: B A is what it adds
    ({"use_qalora": True, "qalora_group_size": 2}, {**BOTH, **{k: np.ones((8, 6), "f4") for k in BOTH if "lora_A" in k}}, True),
    ({"use_bdlora": BLOCKS}, BLOCK_DIAGONAL, True),
]


@pytest.mark.parametrize(("changes", "tensors", "expected"), VARIANTS)
def test_a_variant_of_lora_is_another_thing_only_where_its_factors_are(
    tmp_path: Path, changes: dict[str, Any], tensors: dict[str, Any], expected: bool
) -> None:
    for program in (VLLM, LLAMA_CPP):
        assert ("variant" in broken(tmp_path, ({**PLAIN, **changes}, tensors), program)) == expected


def test_a_program_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vllm, llama\.cpp, mlx"):
        broken(tmp_path, (PLAIN, BOTH), "ollama")
