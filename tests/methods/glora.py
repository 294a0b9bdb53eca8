"""GLoRA, as the tests need to know it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_ref.methods.glora import FORMS, GLoRA
from tests.methods.config_words import NUMBERS, OWN_TARGETS, SWITCH
from tests.methods.facts import Facts, Tour


def as_made(module: Any, method: Any) -> bool:
    from tests.files.peft_models import layer_of

    forms = method.forms(layer_of(module))
    ends = {"lora": ["Xd", "Xu"], "vector": ["X"], "constant": ["X"], "none": ["zeros"]}
    made = {end: list(getattr(module, f"glora_{end}")["default"].state_dict()) for end in "ABCDE"}
    return bool(module.r["default"] == method.r and made == {end: ends[form] for end, form in forms.items()})


def glora(**options: Any) -> Any:
    import peft

    return peft.GloraConfig(**{"target_modules": ["q", "up"], **options})


FACTS = Facts(
    settings={
        "glora": GLoRA(r=4),
        "glora-vector": GLoRA(r=4, config_A_B="vector", config_C="vector", config_D_E="vector"),
        "glora-constant": GLoRA(r=3, config_A_B="constant", config_D_E="vector"),
        "glora-none": GLoRA(r=3, config_A_B="none", config_C="none", config_D_E="none"),
        "glora-mixed": GLoRA(r=2, config_A_B="lora", config_C="none", config_D_E="vector"),
    },
    fields={name: st.sampled_from(forms) for name, forms in FORMS.items()},
    few={"config_A_B": st.just("lora"), "config_C": st.just("lora"), "config_D_E": st.just("vector")},
    config={"peft_type": "GLORA", "r": 4, "target_modules": ["q", "up"]},
    space=OWN_TARGETS
    | {
        "r": NUMBERS,
        "init_weights": SWITCH,
        **{name: [*FORMS["config_A_B"], "", None, 1, ["lora"]] for name in FORMS},
        "bias": ["none", "all", "glora_only", "some_only", "some", "", None, True],
    },
    made=as_made,
    dialects={"unmerge-divides": lambda case, dtype: case.startswith("glora.") and case.endswith(".unmerge")},
    models={
        "glora": (None, lambda: glora(r=3, modules_to_save=["head"])),
        "glora vectors": (None, lambda: glora(config_A_B="vector", config_C="vector", config_D_E="vector", bias="all")),
        "glora constants": (None, lambda: glora(config_A_B="constant", config_C="none")),
        "glora of nothing": (None, lambda: glora(config_A_B="none", config_C="none", config_D_E="none")),
    },
    tour=Tour("GloraConfig", {"r": 2}, frozenset({"gpt2"})),  # no Conv1D
)
