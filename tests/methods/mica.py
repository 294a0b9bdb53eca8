"""MiCA, as the tests need to know it."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from peft_ref.methods.mica import MiCA
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced

FACTS = Facts(
    small={"r": 1},
    files_elsewhere="tests/hf_api/test_quick_tour.py: PEFT refuses a float64 weight",
    unable=lambda case, dtype: dtype == "float64",  # PEFT refuses a float64 weight
    made_in_float32=True,
    settings={"mica": MiCA(r=4, lora_alpha=6), "mica-rslora": MiCA(r=2, lora_alpha=6, use_rslora=True)},
    fields={"r": st.sampled_from((2, 1))},
    few={"r": st.just(1)},
    without_signs=lambda p: {"A": p["A"], "directions": p["B"] @ p["B"].T},
    tour=Tour("LoraConfig", {"r": 2, "init_lora_weights": "mica"}),
    wrong_starts={
        "MiCA's A random": ("mica.linear.init-default", replaced("_A", lambda c, v, rng: rng.normal(size=v.shape)), "init-A-random"),
        "MiCA's B not of length 1": (
            "mica.linear.init-default",
            replaced("_B", lambda c, v, rng: rng.normal(size=v.shape)),
            "init-B-not-orthonormal",
        ),
        "MiCA's B of the largest": (
            "mica.linear.init-default",
            replaced("_B", lambda c, v, rng: np.linalg.svd(np.asarray(c.weight), full_matrices=False)[0][:, : v.shape[1]]),
            "init-B-other-directions",
        ),
    },
)
