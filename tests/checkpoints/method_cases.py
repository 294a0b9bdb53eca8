"""An adapter of every method that PEFT can merge, on a small checkpoint; and how near to PEFT's a plan's result has to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_ref.methods import METHODS
from tests.checkpoints.beside_peft import Net, gpt2, made, peft, saved_adapter, saved_base
from tests.methods import facts

# To the bit in float32 too: sums of products in an order that is known, or nothing but one product or sum for a number.
BITS = frozenset(
    {"AdaLoRA", "BDLoRA", "BEFT", "IA3", "LoHa", "LoRA", "MiCA", "MiSS", "MonteCLoRA", "SHiRA", "SuperTuning", "TrainableTokens", "VeLoRA"}
)
# What others may differ by: in 16 bits, in last places of the largest number that meets there; in float32, in parts of the largest number
# of the tensor, since there PEFT's own numbers are those of a solved equation, a transform or a norm, each some roundings from exact.
# Two places: one place of a rounded delta moves a sum from one tie to the next, and ties go to the even one.
PLACES, PART = 2.0, 2.0**-17
# PEFT puts OSF's weight together again from singular vectors that it rounded to 16 bits; here it is added to.
MORE_PLACES = {"OSF": 8.0}
MORE_PART = {"OSF": 2.0**-14}
SELDOM = 1e-3  # of the numbers that a bfloat16 merge changes
FINER = {"BF16": 1, "F16": 8}  # places in one of bfloat16's: so much more often does the same error cross one
OFTEN = {"OSF": 0.05, "KaSA": 2e-3}  # of a decomposition that two libraries make
UNMERGED = {
    "PSOFT": "its file leaves out the singular vectors, whose signs are the library's choice: refused",
    "QALoRA": "PEFT merges it into no weight: its bases are quantised",
}

Make = Callable[[], Any]


def plain(config: Any) -> Any:
    if isinstance(config.target_modules, set | list):  # the net's table has the name of one here, which a checkpoint tells by
        config.target_modules = {"embed_tokens" if name == "table" else name for name in config.target_modules}
    return config


def _lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q", "up"], **options})


EVERY = ["q", "up", "conv1", "conv2", "conv3", "embed_tokens"]
MORE: dict[str, tuple[Make, Make]] = {
    "LoRA": (Net, lambda: _lora(target_modules=EVERY)),
    "DoRA": (Net, lambda: _lora(target_modules=EVERY, use_dora=True)),
    "DoRA gpt2 Conv1D": (gpt2, lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["c_attn", "c_proj"])),
    "MiCA": (Net, lambda: _lora(init_lora_weights="mica")),
    "KaSA": (Net, lambda: _lora(kasa_config=peft.KasaConfig())),
    "AdaLoRA": (Net, lambda: peft.AdaLoraConfig(init_r=9, target_r=2, total_step=9, target_modules=["q", "up", "conv2"])),
    "AdaLoRA gpt2 Conv1D": (gpt2, lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["c_attn"])),
    "LoHa": (Net, lambda: peft.LoHaConfig(r=9, alpha=6, target_modules=["q", "up", "conv1", "conv2"])),
    "IA3": (Net, lambda: peft.IA3Config(target_modules=["q", "up", "conv2", "conv3"], feedforward_modules=["up", "conv3"])),
    "IA3 gpt2 Conv1D": (gpt2, lambda: peft.IA3Config(task_type="CAUSAL_LM")),
    "OSF": (Net, lambda: peft.OSFConfig(target_modules=["q", "up"], effective_rank=4)),
    "BEFT": (Net, lambda: peft.BeftConfig(target_modules=["q"])),
    "MiSSMini": (Net, lambda: peft.MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=["q"])),
    "TrainableTokens": (Net, lambda: peft.TrainableTokensConfig(token_indices=[79, 3, 50], target_modules=["embed_tokens"])),
    "RoAd four": (Net, lambda: peft.RoadConfig(variant="road_4", group_size=16, target_modules=["q", "up"])),
}
UNABLE = frozenset({"beft", "miss mini", "road four"})  # PEFT refuses these on layers of other sizes than those they were made for


def cases() -> dict[str, tuple[str, Make, Make]]:
    """By label the method's class, a model and a configuration."""
    named = {label: (label.split(" ", maxsplit=1)[0], *pair) for label, pair in MORE.items()}
    for name in METHODS.weights:
        for label, (make, config) in facts(name).models.items():
            if label not in UNABLE:
                named[label] = (METHODS[name].__name__, make or Net, config)
    return named


def folders(tmp_path: Path, label: str, dtype: str) -> tuple[Any, Path, Path]:
    _, make, config = cases()[label]
    model = made(make, dtype)
    return model, saved_base(model, tmp_path / "base"), saved_adapter(model, plain(config()), tmp_path / "adapter")
