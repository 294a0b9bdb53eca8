"""KaSA, as the tests need to know it."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.kasa import KaSA
from tests.methods.facts import Facts, Tour
from tests.methods.wrong import replaced

SMALL = st.builds(Linear, in_features=st.integers(3, 6), out_features=st.integers(3, 6))

FACTS = Facts(
    files_elsewhere="tests/hf_api/test_quick_tour.py: PEFT cuts the weight it is read for, in float32",
    settings={
        "kasa-bias": KaSA(r=4, lora_alpha=6, lora_bias=True),
        "kasa": KaSA(r=4, lora_alpha=6),
        "kasa-rslora": KaSA(r=2, lora_alpha=6, use_rslora=True),
    },
    fields={"r": st.sampled_from((2, 1))},  # fewer than a layer has singular values
    few={"r": st.just(1)},
    layers={"linear": SMALL},
    few_layers={"linear": Linear(in_features=3, out_features=4)},
    tour=Tour("LoraConfig", {"r": 2, "kasa_config": {"beta": 1e-4, "gamma": 1e-3}}, frozenset({"gpt2"})),
    wrong_starts={
        "KaSA's B random": ("kasa.linear.init-default", replaced("_B", lambda c, v, rng: rng.normal(size=v.shape)), "init-B-random"),
        "KaSA's values at one": ("kasa.linear.init-default", replaced("lora_diag", lambda c, v, rng: v * 0 + 1), "init-wrong-law"),
        "KaSA's weight without its largest": (
            "kasa.linear.init-default",
            lambda c, draw, rng: {**draw, "weight": _largest_cut(np.asarray(c.weight), c.adapters[0].config["r"])},
            "init-weight-cut-wrong",
        ),
        "KaSA's weight not sent": (
            "kasa.linear.init-default",
            lambda c, draw, rng: {k: v for k, v in draw.items() if k != "weight"},
            "init-weight-kept",
        ),
    },
)


def _largest_cut(W: np.ndarray, r: int) -> np.ndarray:  # type: ignore[type-arg]
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    return (U[:, r:] * S[r:]) @ Vh[r:]
