"""SHiRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.shira import SHiRA
from tests.methods.config_words import NUMBERS, OWN_TARGETS, SWITCH
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced


def shira(**options: Any) -> Any:
    import peft

    return peft.ShiraConfig(**options)


FACTS = Facts(
    settings={"shira": SHiRA(r=2, random_seed=3)},
    required={"r": 1},
    small={"r": 1},
    fields={"r": st.sampled_from((1, 2)), "random_seed": st.sampled_from((None, 3))},  # of three there are more places than a weight has
    fresh={"init_weights": st.just(True)},
    few={"r": st.just(1)},
    layers={"linear": st.builds(Linear, in_features=st.integers(3, 6), out_features=st.integers(3, 6))},
    config={"peft_type": "SHIRA", "r": 1, "target_modules": ["q", "up"]},
    space=OWN_TARGETS
    | {
        "r": NUMBERS,
        "random_seed": [None, 0, 7, -1, 2**40, "7", 1.5, []],
        "init_weights": SWITCH,
        "fan_in_fan_out": [True, False],
    },
    made=lambda module, method: bool(module.r["default"] == method.r),
    models={"shira": (None, lambda: shira(r=2, random_seed=5, target_modules=["q", "up"]))},
    wrong_starts={
        "SHiRA's places of another seed": (
            "shira.linear.init-default",
            replaced("indices", lambda c, v, rng: np.stack(np.divmod(np.sort(rng.permutation(35)[: v.shape[1]]), 5))),
            "init-other-places",
        ),
        "SHiRA's places not sorted": (
            "shira.linear-large.init-false",
            replaced("indices", lambda c, v, rng: v[:, ::-1]),
            "init-other-places",
        ),
        "SHiRA's numbers random": (
            "shira.linear.init-default",
            replaced("shira_weight", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
    },
    bits=None,  # a few numbers are added up
    tour=Tour("ShiraConfig", {"r": 1}, frozenset({"gpt2"})),  # no Conv1D
)
