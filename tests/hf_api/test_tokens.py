"""trainable_token_indices in PEFT's quick tour, beside live PEFT, on models whose tables are called and tied in several ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

import peft  # noqa: E402

from peft_ref import hf  # noqa: E402
from tests.hf_api.sides import MODELS, bases, called, live, printed, same_folder, same_output, scatter, their_state  # noqa: E402

ADALORA = {"init_r": 3, "target_r": 2, "total_step": 9}


@pytest.mark.parametrize(
    ("model", "cls", "more"),
    [
        ("llama", "LoraConfig", {}),
        ("gpt2", "LoraConfig", {}),
        ("gpt2", "AdaLoraConfig", ADALORA),
        ("t5", "LoraConfig", {"use_dora": True}),
        ("classifier", "LoraConfig", {}),
    ],
)
def test_the_quick_tour_with_trained_tokens(
    model: str, cls: str, more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"target_modules": [MODELS[model][4]], "task_type": MODELS[model][2], "trainable_token_indices": [9, 1, 5], **more}
    given, (base, ours_base) = called(model), bases(model)
    with live():
        theirs = peft.get_peft_model(base, getattr(peft, cls)(**said)).eval()
        scatter(theirs, 2)
    ours = hf.get_peft_model(ours_base, getattr(hf, cls)(**said))
    assert printed(ours, capsys) == printed(theirs, capsys)
    hf.set_peft_model_state_dict(ours, their_state(theirs))
    same_output(theirs, ours, given)
    with live():
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(bases(model)[0], tmp_path / "theirs").eval()
    same_folder(tmp_path / "theirs", tmp_path / "ours", exact=True)
    given = {key: value for key, value in given.items() if cls == "LoraConfig" or key != "labels"}  # PEFT's loaded AdaLoRA has no loss
    read = hf.PeftModel.from_pretrained(ours_base, tmp_path / "theirs")
    same_output(again, read, given, "read again")
    with live(), again.disable_adapter(), read.disable_adapter():
        same_output(again, read, given, "disabled")
    with live():
        merged = again.merge_and_unload()
    same_output(merged, read.merge_and_unload(), given, "merged")
