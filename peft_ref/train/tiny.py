"""A tiny random Llama of bytes, as the folder that HF's `save_pretrained` writes: something to try a training on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from peft_ref.errors import ConfigError
from peft_ref.files.atomic import replace_files
from peft_ref.files.safetensors import serialize
from peft_ref.nn import model_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "torch_dtype": "float32",
}
DEVIATION = 0.1  # wider than a real start's, so that the blocks say something


def write_tiny(folder: Path, seed: int) -> None:
    """Write it, unless something else lies there."""
    said = json.dumps(CONFIG, indent=2).encode()
    there = folder / "config.json"
    if folder.exists() and not (there.is_file() and there.read_bytes() == said):
        raise ConfigError(f"{folder} exists, and is no tiny model that was made here: it is not written over.\n  Choose another --out.")
    rng = np.random.default_rng([seed, 2])
    shapes = model_of(CONFIG).shapes()
    tensors = {n: (rng.normal(0, DEVIATION, s) if len(s) > 1 else np.ones(s)).astype(np.float32) for n, s in shapes.items()}
    replace_files(folder, {"model.safetensors": serialize(tensors, {"format": "pt"}), "config.json": said})
