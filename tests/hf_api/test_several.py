"""Several adapters on one model, step by step beside live PEFT: outputs, names, statuses, combinations, what is left when they go."""

from __future__ import annotations

from collections.abc import Callable
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

from peft_ref import hf  # noqa: E402
from tests.hf_api.sides import GIVEN, MODELS, bases, called, live, printed, same_folder, same_output, scatter, their_state  # noqa: E402

KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 2}, {"r": 2, "lora_alpha": 3}),
    "ia3": ("IA3Config", {"feedforward_modules": []}, {"feedforward_modules": []}),
    "loha": ("LoHaConfig", {"r": 2}, {"r": 3}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}, {"r": 1, "use_dora": True}),
}


def both(kind: str, model: str = "llama") -> tuple[Any, Any]:
    """PEFT's model and ours with the same "default" and "other"."""
    cls, first, second = KINDS[kind]
    base, ours_base = bases(model)
    more = {"task_type": MODELS[model][2], "target_modules": [MODELS[model][4]]}
    with live():
        theirs = peft.get_peft_model(base, getattr(peft, cls)(**first, **more))
        theirs.add_adapter("other", getattr(peft, cls)(**second, **more))
        for seed, name in enumerate(("default", "other")):
            theirs.set_adapter(name)
            scatter(theirs, seed)
        theirs.set_adapter("default")
        theirs.eval()
    ours = hf.get_peft_model(ours_base, getattr(hf, cls)(**first, **more))
    ours.add_adapter("other", getattr(hf, cls)(**second, **more))
    for name in ("default", "other"):
        hf.set_peft_model_state_dict(ours, their_state(theirs, name), name)
    return theirs, ours


STEPS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,
    "other": lambda m: m.set_adapter("other"),
    "merged": lambda m: m.merge_adapter(),
    "unmerged": lambda m: m.unmerge_adapter(),
    "merged other": lambda m: m.merge_adapter(["other"]),
    "unmerged again": lambda m: m.unmerge_adapter(),
    "frozen": lambda m: m.set_requires_grad("other", False),
    "default": lambda m: m.set_adapter("default"),
    "deleted": lambda m: m.delete_adapter("other"),
}


@pytest.mark.parametrize("model", ["llama", "t5", "classifier"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_by_step(kind: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = both(kind, model)
    rounding = 1e-6 if kind == "ia3" else 1e-9  # PEFT divides by l + 1e-8 to unmerge
    for name, step in STEPS.items():
        with live():
            step(theirs)
        step(ours)
        same_output(theirs, ours, called(model), name, rounding)
        assert ours.active_adapters == theirs.active_adapters, name
        assert ours.active_adapter == theirs.active_adapter, name
        assert list(ours.peft_config) == list(theirs.peft_config), name
        assert printed(ours, capsys) == printed(theirs, capsys), name
        assert [s._asdict() for s in ours.get_layer_status()] == [vars(s) for s in theirs.get_layer_status()], name
        assert ours.get_model_status()._asdict() == vars(theirs.get_model_status()), name
        with live(), theirs.disable_adapter(), ours.disable_adapter():
            same_output(theirs, ours, called(model), f"{name}, disabled", rounding)
        same_output(theirs, ours, called(model), f"{name}, enabled again", rounding)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unloaded_and_unloaded_alone(kind: str) -> None:
    theirs, ours = both(kind)
    base, ours_base = theirs.get_base_model(), ours.get_base_model()
    bare = ours.unload()
    merged = ours.merge_and_unload(adapter_names=["other", "default"])
    same_output(bases("llama")[0], bare, called("llama"), "unloaded")
    with live():
        theirs.base_model.set_adapter(["other", "default"])
        theirs_merged = theirs.merge_and_unload()
    assert theirs_merged is base
    same_output(theirs_merged, merged, called("llama"), "merged")
    same_output(bases("llama")[0], ours_base, called("llama"), "ours is left as it was")


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "magnitude_prune"])
def test_weighted_combinations(combination: str, tmp_path: Path) -> None:
    theirs, ours = both("lora")
    more = {"density": 0.5} if combination in ("ties", "magnitude_prune") else {}
    for side, model in (("theirs", theirs), ("ours", ours)):
        with live():
            model.add_weighted_adapter(["default", "other"], [0.5, -0.25], "both", combination, **more)
            model.set_adapter("both")
            model.save_pretrained(tmp_path / side, selected_adapters=["both"])
    same_output(theirs, ours, called("llama"))
    if combination != "svd":  # whose factors have a sign of their own
        same_folder(tmp_path / "theirs" / "both", tmp_path / "ours" / "both", exact=False, rounding=1e-12)


def test_combination_of_ia3() -> None:
    theirs, ours = both("ia3")
    for model in (theirs, ours):
        with live():
            model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "both")
            model.set_adapter("both")
    same_output(theirs, ours, called("llama"))


def test_rows_that_name_their_adapters() -> None:
    theirs, ours = both("lora")
    names = ["other", "__base__"]
    with live(), torch.no_grad():
        expected = theirs(**{k: torch.tensor(v) for k, v in GIVEN.items()}, adapter_names=names).logits
    np.testing.assert_allclose(ours(**GIVEN, adapter_names=names).logits, expected, rtol=1e-9)


def test_adapters_of_two_types(tmp_path: Path) -> None:
    base, ours_base = bases("llama")
    more: dict[str, Any] = {"target_modules": ["q_proj"]}
    with live():
        parts = {"a": peft.LoraConfig(r=2, **more), "b": peft.LoHaConfig(r=2, **more)}
        for name, config in parts.items():
            single = peft.get_peft_model(bases("llama")[0], config, adapter_name="default")
            scatter(single, 3)
            single.save_pretrained(tmp_path / name)
        theirs = peft.PeftMixedModel.from_pretrained(base, str(tmp_path / "a"), "a")
        theirs.load_adapter(str(tmp_path / "b"), "b")
        theirs.set_adapter(["a", "b"])
        theirs.eval()
    ours = hf.PeftMixedModel.from_pretrained(ours_base, tmp_path / "a", "a")
    ours.load_adapter(tmp_path / "b", "b")
    ours.set_adapter(["a", "b"])
    same_output(theirs, ours, called("llama"))
    with live(), theirs.disable_adapter(), ours.disable_adapter():
        same_output(theirs, ours, called("llama"), "disabled")
    with live():
        merged = theirs.merge_and_unload()
    same_output(merged, ours.merge_and_unload(), called("llama"), "merged")


def test_several_prompts() -> None:
    base, ours_base = bases("classifier")
    with live():
        theirs = peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"))
        theirs.add_adapter("other", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"))
        fresh = theirs.get_nb_trainable_parameters()
        for name in ("default", "other"):
            theirs.set_adapter(name)
            scatter(theirs, 4)
        theirs.set_adapter("default")
        theirs.eval()
    ours = hf.get_peft_model(ours_base, hf.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"))
    ours.add_adapter("other", hf.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"))
    assert ours.get_nb_trainable_parameters() == fresh
    for name in ("default", "other"):
        hf.set_peft_model_state_dict(ours, their_state(theirs, name), name)
    for name in ("default", "other", "default"):
        theirs.set_adapter(name)
        ours.set_adapter(name)
        same_output(theirs, ours, called("classifier"), name)
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for model in (theirs, ours):
        model.set_adapter("other", inference_mode=True)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for model in (theirs, ours):
        model.set_adapter("default")
        model.delete_adapter("default")
    assert ours.active_adapters == theirs.active_adapters == ["other"]
    same_output(theirs, ours, called("classifier"), "after deletion")


def test_an_injected_adapter_acts_without_a_peft_model() -> None:
    base, ours_base = bases("gpt2")
    with live():
        theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=2), base)
        scatter(theirs, 2)
        wrapped = peft.get_peft_model(bases("gpt2")[0], peft.LoraConfig(r=2))
        scatter(wrapped, 2)
    ours = hf.inject_adapter_in_model(hf.LoraConfig(r=2), ours_base)
    assert hf.get_peft_model_state_dict(ours).keys() == their_state(wrapped).keys()
    again = hf.get_peft_model(ours_base, hf.LoraConfig(r=2))
    hf.set_peft_model_state_dict(again, their_state(wrapped))
    same_output(theirs.eval(), again, called("gpt2"))
