"""How the methods on weights are trained beside PEFT: the name of its configuration's class, its words, and on which model; or why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Q = ["q_proj", "v_proj", "down_proj"]


class Asked(NamedTuple):
    config: str
    words: dict[str, Any]
    model: str = "llama"


def on(config: str, **words: Any) -> Asked:
    return Asked(config, {"target_modules": Q, **words})


BESIDE: Mapping[str, Asked] = {
    "adamss": on("AdamssConfig", r=4, num_subspaces=1, subspace_rank=2),
    "bdlora": on("LoraConfig", r=4, use_bdlora={"nblocks": 2, "match_strict": False, "target_modules_bd_a": ["down_proj"]}),
    "beft": on("BeftConfig"),
    "boft": on("BOFTConfig", boft_block_size=2),
    "c3a": on("C3AConfig", block_size=2),
    "deft": on("DeftConfig", r=2),
    "delora": on("DeloraConfig", r=3),
    "fourierft": on("FourierFTConfig", n_frequency=7),
    "frod": on("FrodConfig", sparse_rate=0.2, progressbar=False),
    "glora": on("GloraConfig", r=2),
    "hra": on("HRAConfig", r=2),
    "kasa": on("LoraConfig", r=3, kasa_config={"beta": 0.0, "gamma": 0.0}),
    "loha effective": on("LoHaConfig", r=2, alpha=3, use_effective_conv2d=True),
    "mica": on("LoraConfig", r=3, init_lora_weights="mica"),
    "oft": on("OFTConfig", oft_block_size=2),
    "osf": on("OSFConfig", effective_rank=2),
    "peanut": on("PeanutConfig", r=2, depth=1),
    "psoft": on("PsoftConfig", r=3, psoft_alpha=6),
    "pvera": on("PveraConfig", r=3),
    "randlora": on("RandLoraConfig", r=2, randlora_alpha=4),
    "road": on("RoadConfig", variant="road_1", group_size=2),
    "shira": on("ShiraConfig", r=2, random_seed=3),
    "supertuning": on("SupertuningConfig", sparsity=0.8, r=2),
    "tinylora": Asked("TinyLoraConfig", {"r": 2, "u": 3, "weight_tying": 0.5, "target_modules": ["c_attn", "mlp.c_proj", "wpe"]}, "gpt2"),
    "trainable tokens": Asked("TrainableTokensConfig", {"token_indices": [1, 5, 3], "target_modules": ["wpe"]}, "gpt2"),
    "unilora": on("UniLoraConfig", r=2, theta_d_length=17),
    "vblora": on("VBLoRAConfig", r=2, num_vectors=5, vector_length=2),
    "vera": on("VeraConfig", r=3),
    "waveft": on("WaveFTConfig", n_frequency=7),
}
APART: Mapping[str, str] = {
    "monteclora": "without its noise it is LoRA; with the noise: test_noise_beside_peft.py",
    "qalora": "PEFT makes it on GPTQ's layers alone",
    "velora": "PEFT keeps a part of x in training mode alone: tests/spec/test_hf_family_quirks.py",
}
