"""generate under PEFT's name, beside live PEFT: greedy tokens with adapters on layers; a prompt beside a loop over PEFT's own forward."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402

from peft_ref import hf  # noqa: E402
from peft_ref.errors import ConfigError  # noqa: E402
from tests.hf_api.sides import IDS, MODELS, bases, live, scatter, their_state, to_torch  # noqa: E402

NEW = 4  # GPT-2 has nine positions
LEFT = np.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def both(model: str, name: str, **options: Any) -> tuple[Any, Any]:
    """PEFT's model and ours with the same adapter, its numbers random."""
    base, ours_base = bases(model)
    said = {"task_type": MODELS[model][2], **options}
    with live():
        theirs = peft.get_peft_model(base, getattr(peft, name)(**said), autocast_adapter_dtype=False).eval()
        scatter(theirs, 11)
    ours = hf.get_peft_model(ours_base, getattr(hf, name)(**said))
    hf.set_peft_model_state_dict(ours, their_state(theirs))
    return theirs, ours


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
def test_greedy_tokens_are_peft_s(model: str, merged: bool) -> None:
    theirs, ours = both(model, "LoraConfig", r=2, lora_alpha=5, target_modules=[MODELS[model][4]])
    if merged:
        theirs.merge_adapter()
        ours.merge_adapter()
    given = {"input_ids": IDS, "attention_mask": LEFT}
    with live(), torch.no_grad():
        expected = theirs.generate(**to_torch(given), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0).numpy()
    assert np.array_equal(ours.generate(**given, max_new_tokens=NEW, eos_token_id=(), pad_token_id=0), expected)


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_prompt_goes_before_every_token_that_is_said(name: str) -> None:
    theirs, ours = both("llama", name, num_virtual_tokens=2)
    said = IDS
    for _ in range(NEW):
        with live(), torch.no_grad():
            logits = theirs(input_ids=torch.tensor(said)).logits[:, -1]
        said = np.concatenate([said, logits.argmax(-1, keepdim=True).numpy()], axis=1)
    assert np.array_equal(ours.generate(IDS, max_new_tokens=NEW, eos_token_id=()), said)
    with ours.disable_adapter():
        assert not np.array_equal(ours.generate(IDS, max_new_tokens=NEW, eos_token_id=()), said)


def test_a_row_ends_with_the_token_of_the_model_s_config() -> None:
    _, ours = both("llama", "LoraConfig", r=2, target_modules=["q_proj"])
    first = int(ours.generate(IDS[:1], max_new_tokens=1, eos_token_id=())[0, -1])
    assert ours.generate(IDS[:1], max_new_tokens=NEW, eos_token_id=first).shape == (1, IDS.shape[1] + 1)
    assert ours.config["eos_token_id"] == 2


def test_a_sample_is_the_generator_s_and_repeats() -> None:
    _, ours = both("llama", "LoraConfig", r=2, target_modules=["q_proj"])
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": True, "temperature": 3.0, "eos_token_id": ()}
    draws = [ours.generate(IDS, rng=seed, **options) for seed in (1, 1, 2)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_task_ids_without_a_multitask_prompt_are_refused() -> None:
    _, ours = both("llama", "LoraConfig", r=2, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="task_ids"):
        ours.generate(IDS, task_ids=np.asarray([0, 1]))
