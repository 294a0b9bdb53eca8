"""SHiRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.shira import SHiRA
from tests.methods.config_words import NUMBERS, OWN_TARGETS, SWITCH
from tests.methods.facts import Difference, Facts, Tour
from tests.methods.wrong import replaced


def shira(**options: Any) -> Any:
    import peft

    return peft.ShiraConfig(**{"target_modules": ["q", "up"], "r": 2, **options})


def as_made(module: Any, method: Any) -> bool:
    from tests.files.peft_models import layer_of

    same = module.shira_indices["default"].numpy() == method.untrained(layer_of(module))["shira_indices"]
    return bool(module.r["default"] == method.r and same.all())


FACTS = Facts(
    settings={"shira": SHiRA(r=2, random_seed=3), "shira-unseeded": SHiRA(r=1)},
    small={"r": 1},
    fields={
        "r": st.sampled_from((1, 2)),
        "random_seed": st.sampled_from((None, 3)),
    },  # of three there are more places than small weights have
    layers={"linear": st.builds(Linear, in_features=st.integers(2, 7), out_features=st.integers(2, 7))},
    few={"r": st.just(2), "random_seed": st.just(3)},
    few_layers={"linear": Linear(in_features=6, out_features=4)},
    config={"peft_type": "SHIRA", "r": 1, "target_modules": ["q", "up"]},
    space=OWN_TARGETS
    | {
        "r": NUMBERS,
        "random_seed": [None, 0, 7, -1, 2**40, "7", 1.5, []],
        "init_weights": SWITCH,
        "fan_in_fan_out": [True, False],
    },
    made=as_made,
    differences=(Difference("we", r"random_seed=.* is of type", "PEFT reads it when a module is made, and here none was"),),
    models={"shira": (None, lambda: shira(random_seed=5))},
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
