"""PSOFT, as the tests need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.psoft import PSOFT
from tests.methods.config_words import LAYERS, NUMBERS, SWITCH, TARGETS
from tests.methods.facts import Difference, Facts, Tour, ranked
from tests.methods.wrong import Draw, replaced

NEUMANN: dict[str, Any] = {"r": 4, "psoft_alpha": 6, "use_cayley_neumann": True}
WORDS = ("num_cayley_neumann_terms", "cayley_neumann_eps")


def as_made(module: Any, method: Any) -> bool:
    turn = module.psoft_R["default"]
    parts = (bool(turn.orth), bool(turn.mag_a), bool(turn.mag_b)) == (method.psoft_orth, method.psoft_mag_a, method.psoft_mag_b)
    series = bool(turn.use_cayley_neumann) == method.use_cayley_neumann and all(getattr(turn, w) == getattr(method, w) for w in WORDS)
    return ranked(module, method) and parts and series


def one_half(case: Any, draw: Draw, rng: Any) -> Draw:
    """The singular values in B alone."""
    length = np.linalg.norm(draw["_psoft_A_cache"], axis=1)
    return {**draw, "_psoft_A_cache": draw["_psoft_A_cache"] / length[:, None], "_psoft_B_cache": draw["_psoft_B_cache"] * length}


FACTS = Facts(
    files_elsewhere="tests/spec/test_hf_psoft_quirks.py: PEFT needs the frozen weight to read one, in float32",
    settings={
        "psoft": PSOFT(r=4, psoft_alpha=6),
        "psoft-pissa": PSOFT(r=3, psoft_alpha=6, ab_svd_init="pissa_init", psoft_mag_a=False),
        "psoft-free": PSOFT(r=4, psoft_orth=False, psoft_mag_b=False),
        "psoft-one": PSOFT(r=1),
        "psoft-neumann": PSOFT(**NEUMANN),
        "psoft-three": PSOFT(**{**NEUMANN, "num_cayley_neumann_terms": 3}, psoft_mag_a=False, psoft_mag_b=False),
        "psoft-eps": PSOFT(**NEUMANN, cayley_neumann_eps=0.4),
    },
    numbers=lambda name, values: values / 8 if name == "q" else values,
    made_in_float32=True,
    without_signs=lambda p: {"product": p["B"] @ p["A"], "halves": np.abs(p["A"] @ p["A"].T)},
    small={"r": 2},
    fields={
        "r": st.sampled_from((2, 3)),
        "psoft_alpha": st.sampled_from((2, 3.5)),
        "num_cayley_neumann_terms": st.sampled_from((5, 1, 2, 3, 6)),
        "cayley_neumann_eps": st.sampled_from((None, 0.3, 0.9)),
    },
    few={"r": st.just(2), "psoft_alpha": st.just(3), "cayley_neumann_eps": st.just(None)},
    layers={"linear": st.builds(Linear, in_features=st.integers(3, 6), out_features=st.integers(3, 6))},
    config={"peft_type": "PSOFT", "r": 4, "psoft_alpha": 6, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "r": NUMBERS,
        "psoft_alpha": [0, 1, 2.5, -3, "8", None, [4]],
        "psoft_dropout": [0.0, 0, 0.1, 0.999, 1, 1.5, -0.1, None, "0.1", True],
        "ab_svd_init": ["psoft_init", "pissa_init", "magic", None, True],
        "psoft_svd": ["full", "lowrank", "magic", None],
        "psoft_svd_lowrank_niter": [10, 2],
        "random_seed": [0, 3],
        "psoft_orth": SWITCH,
        "psoft_mag_a": SWITCH,
        "psoft_mag_b": SWITCH,
        "use_cayley_neumann": SWITCH,
        "num_cayley_neumann_terms": [5, 1, 3, 0, -1],
        "cayley_neumann_eps": [None, 0.5, 0, 1, 1.5],
        "init_weights": SWITCH,
        "fan_in_fan_out": [True, False],
    },
    made=as_made,
    differences=(
        Difference("we", r"psoft_dropout=(1|1\.0|-0\.1): a probability", "PEFT divides by zero at 1, and ignores what is below 0"),
        Difference("we", r"psoft_(orth|mag_a|mag_b)=('|\[).* expected bool", "a text or list as a switch: PEFT takes 'no' for true"),
    ),
    wrong_starts={
        "PSOFT's R drawn": (
            "psoft.linear.init-default",
            replaced("psoft_R.weight", lambda c, v, rng: rng.normal(0, 0.1, v.shape)),
            "init-not-identity",
        ),
        "PSOFT's scale not taken out": (
            "psoft.linear.init-default",
            replaced("_psoft_B_cache", lambda c, v, rng: v * 1.5),
            "init-wrong-part",
        ),
        "PSOFT's halves the other way": ("psoft.linear.init-pissa", one_half, "init-wrong-halves"),
    },
    irrational=True,
    tour=Tour("PsoftConfig", {"r": 2}, frozenset({"gpt2"})),  # no Conv1D
)
