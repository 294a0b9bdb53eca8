"""DEFT, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.deft import DEFT
from tests.methods.config_words import LAYERS, NUMBERS, SWITCH, TARGETS
from tests.methods.facts import Difference, Facts, Tour


def as_made(module: Any, method: Any) -> bool:
    from tests.files.peft_models import layer_of

    r = method.dims(layer_of(module))["r"]
    made = (
        module.deft_r["default"],
        module.deft_decomposition["default"],
        bool(module.deft_para["default"]),
        module.deft_scaling["default"],
    )
    return bool(made == (r, method.decomposition_method, method.para, method.scale(r)))


def deft(**options: Any) -> Any:
    import peft

    return peft.DeftConfig(**{"r": 3, "target_modules": ["q", "up"], **options})


FACTS = Facts(
    settings={
        "deft": DEFT(r=4),
        "deft-alpha": DEFT(r=3, alpha=5),
        "deft-qr": DEFT(r=4, decomposition_method="qr", alpha=3),
        "deft-qr-capped": DEFT(r=9, decomposition_method="qr", alpha=3),
        "deft-para": DEFT(r=3, para=True),
        "deft-para-qr": DEFT(r=3, para=True, decomposition_method="qr"),
    },
    float32_modules=("peft.tuners.deft.layer",),
    # relu has a corner, and Q's signs jump: differences go across both. What is put in is compared with PEFT's, and in the judge's cases.
    fields={
        "r": st.sampled_from((2, 1)),
        "decomposition_method": st.just("qr"),
        "para": st.just(True),
        "alpha": st.sampled_from((None, 2, 0, 3.5)),
    },
    fresh={"para": st.just(False)},
    few={"decomposition_method": st.just("qr"), "para": st.just(False)},
    layers={
        kind: st.builds(Linear, in_features=st.integers(1, 6), out_features=st.integers(5, 7), transposed=st.just(kind != "linear"))
        for kind in ("linear", "transposed_linear")
    },
    config={"peft_type": "DEFT", "r": 4, "target_modules": ["q", "up"]},
    space=TARGETS
    | LAYERS
    | {
        "r": NUMBERS,
        "alpha": [None, 0, 1, 3, 2.5, "3", True],
        "decomposition_method": ["relu", "qr", "svd", "", None, 1],
        "para": SWITCH,
        "init_scale": [1.0, 0.5, None, "1"],
        "init_weights": SWITCH,
        "deft_dropout": [0.0, 0.5, 1.5, None, "0.1"],
        "bias": ["none", "all", "deft_only", "some_only", "some", "", None, True],
        "fan_in_fan_out": [True, False],
    },
    made=as_made,
    differences=(
        Difference("we", r"para=('|\[).* expected bool", "a text or list as a switch: PEFT takes 'no' for true"),
        Difference("we", r"init_scale=.* expected int or float", "PEFT reads it where init_weights is off, and here it is on"),
    ),
    models={
        "deft": (None, lambda: deft(alpha=5, modules_to_save=["head"])),
        "deft qr": (None, lambda: deft(decomposition_method="qr", bias="all")),
        "deft para": (None, lambda: deft(para=True)),
    },
    tour=Tour("DeftConfig", {"r": 2}),
    bits="float64",
    irrational=True,
)
