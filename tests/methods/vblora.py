"""VB-LoRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.vblora import VBLoRA
from tests.methods.config_words import LAYERS, TARGETS
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def vblora(**options: Any) -> Any:
    import peft

    return peft.VBLoRAConfig(**{"target_modules": ["q"], "num_vectors": 7, "vector_length": 2, **options})


def gpt2() -> Any:
    from tests.files.peft_models import gpt2 as model

    return model()


def of(kind: str) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda a, b: Linear(in_features=2 * a, out_features=2 * b, transposed=kind != "linear"), st.integers(1, 3), st.integers(1, 3)
    )


KINDS = ("linear", "transposed_linear")
FACTS = Facts(
    settings={
        "vblora": VBLoRA(r=3, num_vectors=7, vector_length=4, topk=2),
        "vblora-one": VBLoRA(r=2, num_vectors=5, vector_length=1, topk=1),
        "vblora-all": VBLoRA(r=2, num_vectors=3, vector_length=2, topk=3),
    },
    small={"r": 2, "num_vectors": 5, "vector_length": 4},
    fields={  # all of them chosen: where two logits change places it jumps
        "num_vectors": st.just(3),
        "topk": st.just(3),
        "vector_length": st.just(2),
    },
    few={"num_vectors": st.just(3), "topk": st.just(3), "vector_length": st.just(2)},
    layers={kind: of(kind) for kind in KINDS},
    few_layers={kind: Linear(in_features=4, out_features=6, transposed=kind != "linear") for kind in KINDS},
    config={"peft_type": "VBLORA", "r": 4, "num_vectors": 9, "vector_length": 2, "topk": 2, "target_modules": ["q"]},
    space=TARGETS
    | LAYERS
    | {
        "r": [1, 2, 3, 8, 0, -1],
        "num_vectors": [9, 3, 2],
        "vector_length": [2, 1, 3, 5],
        "topk": [1, 2, 0, -1],
        "vblora_dropout": [0.0, 0.5],
        "init_vector_bank_bound": [0.02, 0.5],
        "init_logits_std": [0.1, 1],
        "save_only_topk_weights": [True, False],
    },
    made=lambda module, method: (module.r["default"], module.topk["default"]) == (method.r, method.topk),
    models={
        "vblora": (None, lambda: vblora(r=4, modules_to_save=["head"])),
        "vblora gpt2 Conv1D": (gpt2, lambda: vblora(r=3, vector_length=4, target_modules=["c_attn", "c_fc"], bias="all")),
    },
    wrong_starts={
        "VB-LoRA's logits zero": (
            "vblora.linear-both.init-wide",
            replaced("logits_A", lambda case, v, rng: np.zeros(v.shape)),
            "init-zero",
        ),
        "VB-LoRA's bank normal": (
            "vblora.linear-both.init-wide",
            replaced("bank", lambda case, v, rng: rng.normal(size=v.shape)),
            "init-wrong-bound",
        ),
    },
    bits=None,
    irrational=True,
    tour=Tour("VBLoRAConfig", {"r": 2, "num_vectors": 5, "vector_length": 4}, frozenset()),
)
