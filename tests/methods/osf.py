"""OSF, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.methods.osf import OSF
from tests.methods.config_words import OWN_TARGETS, SWITCH
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import Draw, replaced


def as_made(module: Any, method: Any) -> bool:
    from tests.files.peft_models import layer_of

    return bool(module.effective_rank["default"] == method.high(layer_of(module)))


def large_part(case: Any, draw: Draw, rng: Any) -> Draw:
    """What is trained are the large singular values."""
    U, S, V = np.linalg.svd(case.weight, full_matrices=False)
    low = len(draw["osf_svd_params.S_low"])
    large = {"U_low": U[:, :low], "S_low": S[:low], "V_low": V[:low]}
    frozen = {"_osf_U_low_init": U[:, :low], "_osf_S_low_init": S[:low], "_osf_V_low_init": V[:low]}
    return {**draw, **{f"osf_svd_params.{name}": v for name, v in large.items()}, **frozen}


FACTS = Facts(
    no_derivative=lambda gradient, several: gradient.endswith(("U_low", "V_low")),  # a part is taken out on purpose
    files_elsewhere="tests/spec/test_hf_osf_quirks.py: PEFT needs the frozen weight to read one",
    settings={"osf": OSF(), "osf-one": OSF(effective_rank=1), "osf-share": OSF(effective_rank=0.7)},
    several=False,
    silent=True,
    without_signs=lambda p: {"trained": p["U"] * p["S"] @ p["V"], "frozen": p["U_0"] * p["S_0"] @ p["V_0"], "left": p["U_0"] @ p["U_0"].T},
    dialects={
        "only-first-adapter": lambda case, dtype: ".two-adapters." in case and case.endswith(("forward", "backward")),
        "unmerge-does-nothing": lambda case, dtype: case.endswith(".unmerge"),
    },
    small={"effective_rank": 1},
    fields={"effective_rank": st.sampled_from((1, 2, 0.5))},
    few={"effective_rank": st.just(2)},
    config={"peft_type": "OSF", "effective_rank": 2, "target_modules": ["q", "up"]},
    space=OWN_TARGETS
    | {
        "effective_rank": [1, 2, 5, 100, 0.5, 1.0, 1.5, None, 0, -1, 0.1, -0.5, "2", [2], True],
        "rank_pattern": [
            {},
            None,
            {"q": 1},
            {"layers.1": 3},
            {"q": 0.5},
            {"q": 0},
            {"up": -1},
            {"(q": 2},
            {"none": 0},
            {"q": "2"},
            ["q"],
            3,
        ],
        "init_weights": SWITCH,
        "target_svd_config": [None, {"q.weight": 3}],
    },
    made=as_made,
    differences=(
        Difference("we", r"OSF at '\w+': a module of kind", "PEFT passes over a layer that it does not take"),
        Difference("we", r"effective_rank=('2'|True) is of type", "PEFT makes a number of a text and of a truth value"),
    ),
    wrong_starts={
        "OSF's large part": ("osf.linear.init-default", large_part, "init-wrong-part"),
        "OSF's U drawn": ("osf.linear.init-default", replaced("U_low", lambda c, v, rng: rng.normal(size=v.shape)), "init-not-identity"),
        "OSF's high part in the low one's place": (
            "osf.linear.init-default",
            replaced("_osf_U_high", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-wrong-subspace",
        ),
    },
    tour=Tour("OSFConfig", {"effective_rank": 2}, frozenset({"gpt2"})),  # no Conv1D
)
