"""LN tuning, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from peft_ref.methods.ln_tuning import LNTuning
from tests.methods.config_words import TARGETS
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import replaced


def ln_tuning(**options: Any) -> Any:
    import peft

    return peft.LNTuningConfig(**options)


FACTS = Facts(
    settings={"ln_tuning": LNTuning()},
    alone=True,
    config={"peft_type": "LN_TUNING", "target_modules": ["q", "up"]},
    space=TARGETS
    | {
        "target_modules": [
            *TARGETS["target_modules"],
            *(["layers.0"], ["layers.9.q"], ["Q"], ["_q"], ["q.weight"], "none", r".*\.none", r"layers\.9\..*", {"up": 1}, 3.5),
        ]
    },
    differences=(Difference("we", "HF PEFT copies whatever it is", "a container: LNTUNING-Q1"),),
    made=lambda module, method: isinstance(method, LNTuning),
    models={"ln_tuning": (None, lambda: ln_tuning(target_modules=["q", "up", "conv2", "table"], modules_to_save=["head"]))},
    wrong_starts={
        "LN weight of a new layer": (
            "ln_tuning.layer-norm.init-default",
            replaced("weight", lambda c, v, rng: v * 0 + 1),
            "init-not-identity",
        ),
        "LN bias of a new layer": ("ln_tuning.layer-norm.init-default", replaced("bias", lambda c, v, rng: v * 0), "init-not-identity"),
    },
    bits="bfloat16",  # of a merge nothing is computed
    irrational=True,
    tour=Tour("LNTuningConfig", {}),
)
