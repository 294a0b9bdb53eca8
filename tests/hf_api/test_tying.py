"""LoraConfig(ensure_weight_tying=True) beside live PEFT: one copy for the table and what is tied to it, counted, stored and trained once."""

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
from tests.hf_api.sides import GPT2, SIZES, called, live, made, pair, printed, same_folder, same_output, scatter, their_state  # noqa: E402

GIVEN: dict[str, dict[str, Any]] = {
    "the table": {"modules_to_save": ["embed_tokens"]},
    "the head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "by its name": {"modules_to_save": ["model.embed_tokens"]},
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
    return {"r": 2, "target_modules": target, "task_type": "CAUSAL_LM", "ensure_weight_tying": True, **copy.deepcopy(GIVEN[name])}  # PEFT writes into the list


def both_sides(name: str) -> tuple[Any, Any]:
    base, our_base = bases(name)
    with live():
        theirs = peft.get_peft_model(base, peft.LoraConfig(**config(name))).eval()
        scatter(theirs, 3)
    ours = hf.get_peft_model(our_base, hf.LoraConfig(**config(name)))
    hf.set_peft_model_state_dict(ours, {k: t for k, t in their_state(theirs).items()})
    return theirs, ours


@pytest.mark.parametrize("name", GIVEN)
def test_output_counts_status_and_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = both_sides(name)
    same_output(theirs, ours, called("llama"), "scattered")
    assert printed(ours, capsys) == printed(theirs, capsys)
    assert [s._asdict() for s in ours.get_layer_status()] == [vars(s) for s in theirs.get_layer_status()]
    assert set(ours.peft_config["default"].modules_to_save) == set(theirs.peft_config["default"].modules_to_save)
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
