"""LoraConfig(ensure_weight_tying=True) beside live PEFT: one copy for the table and what is tied to it, counted and stored once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from peft_ref import hf  # noqa: E402
from peft_ref.errors import KeyMismatchError, UnsupportedLayerError  # noqa: E402
from peft_ref.hf import BaseModel  # noqa: E402
from tests.hf_api import sides  # noqa: E402
from tests.hf_api.sides import GPT2, SIZES, called, live, pair, printed, same_folder, same_output, scatter, their_state  # noqa: E402
from tests.nn.beside_hf import share_again  # noqa: E402

GIVEN: dict[str, dict[str, Any]] = {
    "the table": {"modules_to_save": ["embed_tokens"]},
    "the head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "by its name": {"modules_to_save": ["model.embed_tokens"]},
    "targets, the table": {"target_modules": ["embed_tokens", "q_proj"]},
    "targets, the head": {"target_modules": ["lm_head"]},
    "targets, a pattern": {"target_modules": "lm_head|.*q_proj"},
    "targets, gaussian": {"target_modules": ["lm_head", "v_proj"], "init_lora_weights": "gaussian"},
    "targets, nobody asks": {"target_modules": "all-linear"},
    "neither": {"modules_to_save": ["norm"]},
    "gpt2": {"modules_to_save": ["lm_head"]},
    "gpt2, a name that does not ask": {"modules_to_save": ["wte"]},
}


def bases(name: str, tied: bool = True) -> tuple[Any, Any]:
    if "gpt2" in name:
        both = pair(transformers.GPT2LMHeadModel, **GPT2)
    else:
        both = pair(transformers.LlamaForCausalLM, **SIZES, tie_word_embeddings=tied)
    return both.live, BaseModel(both.graph)


def config(name: str) -> dict[str, Any]:
    target = ["c_attn"] if "gpt2" in name else ["q_proj"]
    return {
        "r": 2,
        "target_modules": target,
        "task_type": "CAUSAL_LM",
        "ensure_weight_tying": True,
        **copy.deepcopy(GIVEN[name]),
    }  # PEFT writes into the list


def both_sides(name: str) -> tuple[Any, Any]:
    base, our_base = bases(name)
    with live():
        theirs = peft.get_peft_model(base, peft.LoraConfig(**config(name))).eval()
        scatter(theirs, 3)
        share_again(theirs)
    ours = hf.get_peft_model(our_base, hf.LoraConfig(**config(name)))
    hf.set_peft_model_state_dict(ours, dict(their_state(theirs).items()))
    return theirs, ours


@pytest.mark.parametrize("name", GIVEN)
def test_output_counts_status_and_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = both_sides(name)
    same_output(theirs, ours, called("llama"), "scattered")
    assert printed(ours, capsys) == printed(theirs, capsys)
    assert [s._asdict() for s in ours.get_layer_status()] == [vars(s) for s in theirs.get_layer_status()]
    for key in ("modules_to_save", "target_modules"):
        said, expected = (getattr(model.peft_config["default"], key) for model in (ours, theirs))
        assert (said if isinstance(said, str | None) else set(said)) == (expected if isinstance(expected, str | None) else set(expected))
    with live():
        theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    same_folder(tmp_path / "theirs", tmp_path / "ours", exact=False)
    base, our_base = bases(name)
    with live():
        again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    our_again = hf.PeftModel.from_pretrained(our_base, tmp_path / "theirs")
    same_output(again, our_again, called("llama"), "loaded")
    assert printed(our_again, capsys) == printed(again, capsys)
    with live(), again.disable_adapter(), our_again.disable_adapter():
        same_output(again, our_again, called("llama"), "disabled")
    with live():
        merged = again.merge_and_unload()
    same_output(merged, our_again.merge_and_unload(ties="share"), called("llama"), "merged")
    weights = our_again.merge_and_unload(ties="share").graph
    assert bool(weights.tied()) is (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_a_fresh_head_starts_last_in_the_memory_of_both(init: bool | str) -> None:
    """So it is the table's factor A that is zero, which alone would be its B."""
    asked = {**config("targets, the head"), "init_lora_weights": init}
    base, our_base = bases("llama")
    with live():
        theirs = their_state(peft.get_peft_model(base, peft.LoraConfig(**asked)))
    ours = hf.get_peft_model_state_dict(hf.get_peft_model(our_base, hf.LoraConfig(**asked)))
    assert ours.keys() == theirs.keys()
    for state in (ours, theirs):
        table, head = ("base_model.model.model.embed_tokens.lora_embedding_", "base_model.model.lm_head.lora_")
        np.testing.assert_array_equal(state[f"{table}A"], np.asarray(state[f"{head}B.weight"]).T)
        np.testing.assert_array_equal(state[f"{table}B"], np.asarray(state[f"{head}A.weight"]).T)
    assert {k: bool(np.any(v)) for k, v in ours.items()} == {k: bool(np.any(v)) for k, v in theirs.items()}
    assert bool(np.any(ours[f"{table}A"])) is (init is False)


def test_what_differs_is_refused_where_peft_takes_the_last() -> None:
    for name, key in (("the head", "lm_head.weight"), ("targets, the head", "lm_head.lora_A.weight")):
        _, ours = both_sides(name)
        tensors = hf.get_peft_model_state_dict(ours)
        with pytest.raises(KeyMismatchError, match="HF PEFT takes"):
            hf.set_peft_model_state_dict(ours, {**tensors, f"base_model.model.{key}": tensors[f"base_model.model.{key}"] + 1})


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"rank_pattern": {"lm_head": 3}},
        {"alpha_pattern": {"lm_head": 3}},
    ],
)
def test_what_cannot_be_shared_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedLayerError, match="ensure_weight_tying"):
        hf.get_peft_model(bases("llama")[1], hf.LoraConfig(**{**config("targets, the head"), **more}))


def test_tables_that_are_tied_are_refused_where_pefts_model_fails() -> None:
    base, our_base = sides.bases("t5")
    asked = {"r": 2, "target_modules": ["q"], "modules_to_save": ["lm_head"], "task_type": "SEQ_2_SEQ_LM", "ensure_weight_tying": True}

    def fails() -> None:
        theirs = peft.get_peft_model(base, peft.LoraConfig(**copy.deepcopy(asked)))
        theirs(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[1, 2]]))

    with live(), pytest.raises((AttributeError, RuntimeError, TypeError, ValueError)):
        fails()
    with pytest.raises(UnsupportedLayerError, match="it is a table too"):
        hf.get_peft_model(our_base, hf.LoraConfig(**asked))
