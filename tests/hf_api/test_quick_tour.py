"""PEFT's quick tour with a graph in place of the torch model, beside the same in live PEFT: every method on every model that it goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

import numpy as np  # noqa: E402
import peft  # noqa: E402

from peft_ref import hf  # noqa: E402
from peft_ref.methods import METHODS  # noqa: E402
from tests.hf_api.sides import (  # noqa: E402
    MODELS,
    bases,
    called,
    live,
    made,
    printed,
    same_folder,
    same_output,
    scatter,
    their_state,
)

PROMPT = {"num_virtual_tokens": 2}
# The name of the configuration's class in both, and its options for what an adapter goes to
METHOD: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 2, "lora_alpha": 5}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3}),
    "prompt_tuning": ("PromptTuningConfig", PROMPT),
    "prefix_tuning": ("PrefixTuningConfig", PROMPT),
    "p_tuning": ("PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 4}),
    "multitask_prompt_tuning": ("MultitaskPromptTuningConfig", {**PROMPT, "num_tasks": 2, "num_ranks": 2}),
}
UNABLE = {
    *((method, "gpt2") for method in ("loha",)),  # no Conv1D
    *(("prefix_tuning", model) for model in ("classifier", "tokens", "questions")),  # PEFT: no past key values
    *(("multitask_prompt_tuning", model) for model in ("questions", "bert")),  # PEFT's forward passes no task_ids on
}
CELLS = [(method, model) for method in METHOD for model in MODELS if (method, model) not in UNABLE]


def configs(method: str, model: str, **more: Any) -> tuple[Any, Any]:
    """The same configuration as PEFT's and as ours."""
    cls, options = METHOD[method]
    task, target = MODELS[model][2], MODELS[model][4]
    targets = {} if method in METHODS.prompts else {"target_modules": [target]}
    said = {**options, **targets, "task_type": task, **more}
    return getattr(peft, cls)(**said), getattr(hf, cls)(**said)


def test_every_method_is_asked() -> None:
    assert METHOD.keys() == METHODS.keys()


@pytest.mark.parametrize(("method", "model"), CELLS)
def test_the_quick_tour(method: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = called(model, **({"task_ids": np.asarray([1, 0])} if method == "multitask_prompt_tuning" else {}))
    if method in METHODS.prompts and model == "tokens":
        given.pop("labels", None)
    base, ours_base = bases(model)
    theirs_config, ours_config = configs(method, model)
    with live():
        theirs = peft.get_peft_model(base, theirs_config).eval()
        scatter(theirs, 2)
    ours = hf.get_peft_model(ours_base, ours_config)
    assert type(ours).__name__ == type(theirs).__name__
    assert printed(ours, capsys) == printed(theirs, capsys)
    if method not in METHODS.prompts:
        hf.set_peft_model_state_dict(ours, their_state(theirs))
        same_output(theirs, ours, given)

    with live():
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        again = peft.PeftModel.from_pretrained(bases(model)[0], tmp_path / "theirs").eval()
    read = hf.PeftModel.from_pretrained(ours_base, tmp_path / "theirs")
    assert type(read).__name__ == type(again).__name__
    assert printed(read, capsys) == printed(again, capsys)
    same_output(again, read, given, "read again")
    read.save_pretrained(tmp_path / "read")
    same_folder(tmp_path / "theirs", tmp_path / "read", exact=True)
    (ours if method not in METHODS.prompts else read).save_pretrained(tmp_path / "ours")
    same_folder(tmp_path / "theirs", tmp_path / "ours", exact=method not in METHODS.prompts)
    with read.disable_adapter():
        same_output(made(model).live, read, {k: v for k, v in given.items() if k != "task_ids"}, "disabled")
