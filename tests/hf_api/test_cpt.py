"""The types of an input's tokens reach CPT, beside live PEFT, and nothing else takes them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

import peft  # noqa: E402

from peft_ref import hf  # noqa: E402
from peft_ref.errors import ConfigError  # noqa: E402
from tests.hf_api.sides import bases, called, live, same_output  # noqa: E402

TYPES = np.asarray([[1, 2, 4, 4, 0], [4, 3, 8, 8, 4]])
WORDS = {"cpt_token_ids": [3, 1, 4], "cpt_tokens_type_mask": [1, 4, 8], "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}


def test_types_of_the_input_weigh_the_loss() -> None:
    base, our_base = bases("llama")
    with live():
        theirs = peft.get_peft_model(base, peft.CPTConfig(task_type="CAUSAL_LM", **WORDS)).eval()
    ours = hf.get_peft_model(our_base, hf.CPTConfig(task_type="CAUSAL_LM", **WORDS))
    same_output(theirs, ours, called("llama", input_type_mask=TYPES))
    assert float(ours(**called("llama", input_type_mask=TYPES)).loss) != float(ours(**called("llama")).loss)


def test_nothing_else_takes_them() -> None:
    lora = hf.get_peft_model(bases("llama")[1], hf.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    prompt = hf.get_peft_model(bases("llama")[1], hf.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for model in (lora, prompt):
        with pytest.raises(ConfigError, match="only CPT reads"):
            model(**called("llama", input_type_mask=TYPES))
