"""BD-LoRA, as the tests need to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.bdlora import BDLoRA, BdLoraConfig
from tests.methods.facts import Facts, Tour, as_configured
from tests.methods.lora import lora
from tests.methods.wrong import replaced

BLOCKS = BdLoraConfig(target_modules_bd_a=("a",), target_modules_bd_b=("b",), nblocks=2, match_strict=False)
HALVES = {"r": st.sampled_from((2, 4)), "use_bdlora": st.just(BLOCKS)}


def peft_options(method: BDLoRA) -> Mapping[str, Any]:
    """PEFT matches the module's name, which the tests have "target" or "linear"."""
    blocks = {"nblocks": method.use_bdlora.nblocks, "match_strict": False}
    if method.diagonal:
        blocks[f"target_modules_bd_{method.diagonal.lower()}"] = ["target", "linear"]
    return {**as_configured(method), "use_bdlora": blocks}


def layer(transposed: bool) -> st.SearchStrategy[Linear]:
    size = st.sampled_from((2, 4, 6))
    return st.builds(Linear, in_features=size, out_features=size, transposed=st.just(transposed))


FACTS = Facts(
    settings={
        "bdlora-bias": BDLoRA(r=4, lora_alpha=6, lora_bias=True, use_bdlora=BLOCKS, diagonal="A"),
        "bdlora-A": BDLoRA(r=4, lora_alpha=6, use_bdlora=BLOCKS, diagonal="A"),
        "bdlora-B": BDLoRA(r=4, lora_alpha=6, use_bdlora=BLOCKS, diagonal="B"),
        "bdlora-neither": BDLoRA(r=4, lora_alpha=6, use_bdlora=BLOCKS),
    },
    peft_options=peft_options,
    fields={**HALVES, "diagonal": st.sampled_from(("A", "B", ""))},
    few={"r": st.just(2), "use_bdlora": st.just(BLOCKS), "diagonal": st.sampled_from(("", "A", "B"))},
    layers={"linear": layer(False), "transposed_linear": layer(True)},
    few_layers={"linear": Linear(in_features=4, out_features=6)},
    models={
        "bdlora": (
            None,
            lora(use_bdlora={"target_modules_bd_a": ["q"], "nblocks": 2}, target_modules=["q"]),
        )
    },
    random=lambda rng, common: lora(  # every name may be asked for, so that a strict one would refuse
        r=int(rng.choice([2, 4])), use_bdlora={"target_modules_bd_a": ["q"], "nblocks": 2, "match_strict": False}, target_modules=["q"]
    )(),
    wrong_starts={
        "BD-LoRA's A like LoRA's": (
            "bdlora.linear-both.init-A",
            replaced("_A", lambda c, v, rng: v / v.shape[1] ** 0.5 / (6 / v.shape[1]) ** 0.5),
            "init-wrong-law",
        ),
        "BD-LoRA's A as of a whole row": ("bdlora.linear-both.init-A", replaced("_A", lambda c, v, rng: v / 2**0.5), "init-wrong-law"),
    },
    tour=Tour("LoraConfig", {"r": 2, "use_bdlora": dict(sorted(asdict(BdLoraConfig(nblocks=2, match_strict=False)).items()))}),
)
