"""Super-Tuning, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.methods.supertuning import SuperTuning
from tests.methods.config_words import NUMBERS, OWN_TARGETS, SWITCH
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def supertuning(**options: Any) -> Any:
    import peft

    return peft.SupertuningConfig(**{"target_modules": ["q", "up"], "sparsity": 0.6, **options})


FACTS = Facts(
    settings={
        "supertuning": SuperTuning(sparsity=0.6),
        "supra": SuperTuning(sparsity=0.6, r=4, lora_alpha=6),
        "supra-bottom": SuperTuning(sparsity=0.5, select_top=False, r=2),
    },
    small={"sparsity": 0.5},
    peft_dropout="supertuning_lora_dropout",
    fields={
        "sparsity": st.sampled_from((0.0, 0.5)),
        "r": st.sampled_from((None, 2)),
        "lora_alpha": st.just(None),
        "save_precomputed_indices": st.just(True),
    },
    few={"sparsity": st.just(0.5), "r": st.just(2), "lora_alpha": st.just(None), "save_precomputed_indices": st.just(True)},
    config={"peft_type": "SUPERTUNING", "sparsity": 0.6, "target_modules": ["q", "up"]},
    space=OWN_TARGETS
    | {
        "sparsity": [0.5, 0, 0.0, 0.9999, 1, 1.5, -0.1, "0.5", None],
        "select_top": [True, False],
        "r": NUMBERS,
        "lora_alpha": [None, 4, 2.5],
        "lora_dropout": [0.0, 0.5, 1.0, -0.1],
        "init_weights": SWITCH,
        "save_precomputed_indices": [True, False],
    },
    made=lambda module, method: (module.supertuning_rank["default"] or None) == method.r,
    models={
        "supertuning": (None, lambda: supertuning(modules_to_save=["head"])),
        "supra": (None, lambda: supertuning(r=3)),
    },
    wrong_starts={
        "Super-Tuning's values random": (
            "supertuning.linear.init-default",
            replaced("values", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
        "Super-Tuning's places the first": (
            "supertuning.linear.init-bottom",
            replaced("indices", lambda c, v, rng: v[::-1] * 0 + range(len(v))),
            "init-other-places",
        ),
    },
    tour=Tour("SupertuningConfig", {"sparsity": 0.5}, frozenset({"gpt2"})),  # no Conv1D
)
