"""PSOFT, as the tests need to know it."""

from __future__ import annotations

from peft_ref.methods.psoft import PSOFT
from tests.methods.facts import Facts

NEUMANN = {"r": 4, "psoft_alpha": 6, "use_cayley_neumann": True}

FACTS = Facts(
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
)
