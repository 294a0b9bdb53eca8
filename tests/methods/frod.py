"""FRoD, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.methods.frod import FRoD
from tests.methods.config_words import LAYERS, OWN_TARGETS, SWITCH
from tests.methods.facts import Difference, Facts
from tests.methods.wrong import Draw, replaced


def peft_options(method: Any) -> dict[str, Any]:
    from tests.methods.facts import as_configured

    return {**as_configured(method), "progressbar": False}


def stretched(case: Any, draw: Draw, rng: Any) -> Draw:
    """The lengths in U, and L of ones."""
    return {**draw, "frod_U": draw["frod_U"] * draw["frod_lambda_l"], "frod_lambda_l": np.ones(draw["frod_lambda_l"].shape)}


FACTS = Facts(
    bits=None,  # the frozen weight is added and subtracted again
    files_elsewhere="tests/spec/test_hf_frod_quirks.py and tests/model/test_shared_state.py: U, which no file holds, is made of the weight",
    settings={
        "frod": FRoD(sparse_rate=0.2),
        "frod-diagonal": FRoD(sparse_rate=0.0),
        "frod-one": FRoD(),
    },
    peft_options=peft_options,
    unable=lambda case, dtype: "two-adapters" in case,
    dialects={"unmerge-saved-copy": lambda case, dtype: "two-adapters" not in case and case.endswith(".unmerge")},
    fields={"sparse_rate": st.sampled_from((0.3, 0.0, 1.0)), "save_projection": st.just(True), "frod_dropout": st.just(0.0)},
    few={"sparse_rate": st.just(0.3), "save_projection": st.just(True)},
    without_signs=lambda p: {"weight": (p["U"] * p["L"]) @ p["V"].T},
    config={"peft_type": "FROD", "sparse_rate": 0.2, "target_modules": ["q", "up"], "progressbar": False},
    space=OWN_TARGETS
    | LAYERS
    | {
        "projection_prng_key": [0, 5, 2**33],
        "save_projection": [True, False],
        "frod_dropout": [0.0, 0.5],
        "init_weights": SWITCH,
        "sparse_rate": [0.0, 0.01, 0.5, 1, 1.5, -0.1],
        "regularization_alpha": [1e-3, 0.5],
        "runtime_offload_base_weight": [True, False],
        "bias": ["none", "all", "frod_only"],
        "fan_in_fan_out": [True, False],
    },
    differences=(Difference("PEFT", "No layer types compatible with FRoD", "it makes a basis of no weight; here nothing is adapted"),),
    made=lambda module, method: module.frod_lambda_s_values["default"].numel() == method.count(module.in_features),
    wrong_starts={
        "FRoD's s drawn": (
            "frod.linear.init-default",
            replaced("s_values", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-not-identity",
        ),
        "FRoD's L one": ("frod.linear-blocks.init-wide", replaced("_lambda_l", lambda c, v, rng: np.ones(v.shape)), "init-not-identity"),
        "FRoD's lengths in U": ("frod.linear-blocks.init-wide", stretched, "init-not-of-length-one"),
        "FRoD's V random": (
            "frod.linear-blocks.init-wide",
            replaced("frod_V", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-wrong-basis",
        ),
        "FRoD's places elsewhere": (
            "frod.linear-blocks.init-wide",
            replaced("s_indices", lambda c, v, rng: v[::-1]),
            "init-other-places",
        ),
        "FRoD's size one more": ("frod.linear.init-default", replaced("s_size", lambda c, v, rng: v + 1), "init-other-size"),
    },
    tour_impossible="PEFT rounds U to float32, whatever the model is; its models are compared in tests/model/test_shared_state.py",
)
