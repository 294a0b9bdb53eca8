"""PEFT's quick tour with a graph in place of the torch model, beside the same in live PEFT: every method on every model that it goes to."""

from __future__ import annotations

from contextlib import nullcontext
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
    to_torch,
)
from tests.methods import facts  # noqa: E402

PROMPT = {"num_virtual_tokens": 2}
# The name of the configuration's class in both, and its options for what an adapter goes to
METHOD: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (tour.config, dict(tour.options)) for name in METHODS.weights if (tour := facts(name).tour)},
    "prompt_tuning": ("PromptTuningConfig", PROMPT),
    "prefix_tuning": ("PrefixTuningConfig", PROMPT),
    "p_tuning": ("PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 4}),
    "cartridge": ("CartridgeConfig", {"num_virtual_tokens": 3}),
    "cpt": ("CPTConfig", {"cpt_token_ids": [3, 1, 4], "cpt_tokens_type_mask": [1, 2, 4], "opt_weighted_loss_type": "decay"}),
    "multitask_prompt_tuning": ("MultitaskPromptTuningConfig", {**PROMPT, "num_tasks": 2, "num_ranks": 2}),
}
UNABLE = {
    *((name, model) for name in METHODS.weights if (tour := facts(name).tour) for model in tour.unable),
    *(("cpt", model) for model in ("classifier", "tokens", "questions", "bert", "t5")),  # it is for causal models alone
    # PEFT: no past key values
    *((method, model) for method in ("cartridge", "prefix_tuning") for model in ("classifier", "tokens", "questions")),
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


def without_loss(model: str, given: dict[str, Any]) -> dict[str, Any]:
    bare = {key: value for key, value in given.items() if key not in ("labels", "start_positions", "end_positions")}
    return {**bare, "decoder_input_ids": given["input_ids"]} if model == "t5" else bare


def test_every_method_is_asked() -> None:
    impossible = {name for name in METHODS.weights if facts(name).tour_impossible}
    assert METHOD.keys() | impossible == (METHODS.weights | METHODS.prompts).keys()
    assert not METHOD.keys() & impossible


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
    if method != "cpt":  # a loaded CPT keeps a delta that nothing uses, and PEFT counts it
        assert printed(read, capsys) == printed(again, capsys)
    same_output(again, read, without_loss(model, given) if method == "adalora" else given, "read again")  # PEFT's raises there: see below
    read.save_pretrained(tmp_path / "read")
    same_folder(tmp_path / "theirs", tmp_path / "read", exact=True)
    (ours if method not in METHODS.prompts else read).save_pretrained(tmp_path / "ours")
    same_folder(tmp_path / "theirs", tmp_path / "ours", exact=method not in METHODS.prompts)
    cut = method in METHODS.weights and METHODS.weights[method].cuts_weight  # then PEFT does not give the weight back: KASA-Q2
    with read.disable_adapter(), again.disable_adapter() if cut else nullcontext():
        same_output(again if cut else made(model).live, read, {k: v for k, v in given.items() if k != "task_ids"}, "disabled")


def test_tokens_are_trained_without_the_head_of_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs_config, ours_config = configs("trainable_tokens", "classifier")
    base, ours_base = bases("classifier")
    with live():
        theirs = peft.get_peft_model(base, theirs_config)
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = hf.get_peft_model(ours_base, ours_config)
    assert printed(ours, capsys) == printed(theirs, capsys)
    ours.save_pretrained(tmp_path / "ours")
    same_folder(tmp_path / "theirs", tmp_path / "ours", exact=True)


@pytest.mark.parametrize("method", METHOD)
def test_a_fresh_adapter_of_ours_is_read_by_peft_and_does_the_same(method: str, tmp_path: Path) -> None:
    """Also of a prompt whose encoder is still there: what it puts out now is what its file does in PEFT."""
    base, ours_base = bases("llama")
    ours = hf.get_peft_model(ours_base, configs(method, "llama")[1], rng=5)
    given = {**called("llama"), **({"task_ids": np.asarray([1, 0])} if method == "multitask_prompt_tuning" else {})}
    ours.save_pretrained(tmp_path)
    with live():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    same_output(theirs, ours, without_loss("llama", given) if method == "adalora" else given)


def test_the_penalty_of_adalora_is_in_the_loss_while_it_is_trained_and_peft_fails_once_it_is_read(tmp_path: Path) -> None:
    base, ours_base = bases("llama")
    ours = hf.get_peft_model(ours_base, configs("adalora", "llama")[1])
    ours.save_pretrained(tmp_path)
    read = hf.PeftModel.from_pretrained(ours_base, tmp_path)
    given = called("llama")
    assert ours(**given).loss > read(**given).loss == ours_base(**given).loss
    with live():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        with pytest.raises(AttributeError, match="trainable_adapter_name"):
            theirs(**to_torch(given))


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "classifier", "t5"])
def test_what_a_configuration_leaves_to_the_model_is_written_into_it(method: str, model: str, tmp_path: Path) -> None:
    """Targets, how the weights are stored, and, where there is no task type, the model's class."""
    cls = METHOD[method][0]
    base, ours_base = bases(model)
    theirs_config, ours_config = getattr(peft, cls)(), getattr(hf, cls)()
    with live():
        theirs = peft.get_peft_model(base, theirs_config)
        scatter(theirs, 2)
        theirs.save_pretrained(tmp_path / "theirs")
    ours = hf.get_peft_model(ours_base, ours_config)
    assert type(ours) is hf.PeftModel
    hf.set_peft_model_state_dict(ours, their_state(theirs))
    ours.save_pretrained(tmp_path / "ours")
    same_folder(tmp_path / "theirs", tmp_path / "ours", exact=(method, model) == ("lora", "gpt2"))  # several targets are a set there
    assert set(ours_config.target_modules) == theirs_config.target_modules
    assert ours.peft_config["default"] is ours_config
    assert ours_config.to_dict().keys() == theirs_config.to_dict().keys()
