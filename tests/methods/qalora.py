"""QA-LoRA, as the tests need to know it."""

from __future__ import annotations

from hypothesis import strategies as st

from peft_ref.layers import Linear
from peft_ref.methods.qalora import QALoRA
from tests.methods.facts import Facts
from tests.methods.wrong import replaced

FACTS = Facts(
    small={"r": 2, "qalora_group_size": 1},
    files_elsewhere="tests/spec/test_hf_family_quirks.py: PEFT makes it on GPTQ's layers alone",
    unable=lambda case, dtype: ".config." not in case,  # PEFT makes it on GPTQ's layers alone
    compared="tests/spec/test_hf_family_quirks.py",
    settings={"qalora": QALoRA(r=4, lora_alpha=6, qalora_group_size=2)},
    fields={"qalora_group_size": st.sampled_from((1, 2, 3))},
    few={"r": st.just(2), "qalora_group_size": st.just(2)},
    layers={"linear": st.builds(Linear, in_features=st.sampled_from((6, 12)), out_features=st.integers(1, 6))},
    few_layers={"linear": Linear(in_features=4, out_features=5)},
    tour_impossible="PEFT makes it on GPTQ's layers alone",
    wrong_starts={
        "QA-LoRA's A too small": (
            "qalora.linear-both.init-default",
            replaced("_A", lambda c, v, rng: v / 2**0.5),
            "init-wrong-law",
        )
    },
)
