"""What spec/hf_api.md calls different, and what is refused: each said once here, beside PEFT where PEFT does something."""

from __future__ import annotations

import json
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
from peft_ref.errors import ConfigError, KeyMismatchError, PeftRefError  # noqa: E402
from peft_ref.files.adapter import load_adapter  # noqa: E402
from peft_ref.graph import MappingGraph  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from tests.hf_api.sides import GIVEN, IDS, TYPES, bases, called, live, same_output, scatter, tensors, to_torch  # noqa: E402

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
MULTITASK: dict[str, Any] = {"num_virtual_tokens": 2, "num_tasks": 2, "task_type": "SEQ_2_SEQ_LM"}


def tuned(**more: Any) -> Any:
    return hf.get_peft_model(bases("llama")[1], hf.LoraConfig(**{**LORA, **more}))


def prompted(model: str = "llama", **more: Any) -> Any:
    return hf.get_peft_model(bases(model)[1], hf.PromptTuningConfig(**{**PROMPT, **more}))


def numbers(model: Any, name: str = "default") -> dict[str, Any]:
    return hf.get_peft_model_state_dict(model, adapter_name=name)


def test_a_fresh_adapter_is_the_same_each_time_and_another_with_another_seed() -> None:
    base = bases("llama")[1]
    first, again = (numbers(hf.get_peft_model(base, hf.LoraConfig(**LORA))) for _ in range(2))
    other = numbers(hf.get_peft_model(base, hf.LoraConfig(**LORA), rng=1))
    key = next(key for key in first if "lora_A" in key)
    np.testing.assert_array_equal(first[key], again[key])
    assert np.any(first[key] != other[key])
    model = tuned()
    model.add_adapter("other", hf.LoraConfig(**LORA))
    assert np.any(numbers(model)[key] != numbers(model, "other")[key])
    torch.manual_seed(0)
    theirs = peft.get_peft_model(bases("llama")[0], peft.LoraConfig(**LORA))
    expected = tensors(peft.get_peft_model_state_dict(theirs))
    assert {k: v.shape for k, v in expected.items()} == {k: v.shape for k, v in first.items()}
    assert np.max(np.abs(first[key])) <= 12**-0.5 >= np.max(np.abs(expected[key]))  # uniform up to 1 / sqrt(in), both


def test_a_graph_of_arrays_takes_adapters_and_does_not_run(tmp_path: Path) -> None:
    graph = MappingGraph(arrays={"q.weight": np.ones((3, 4))}, layers={"q": Linear(in_features=4, out_features=3)})
    model = hf.get_peft_model(graph, hf.LoraConfig(r=2, target_modules=["q"]))
    model.save_pretrained(tmp_path)
    assert load_adapter(tmp_path).modules.keys() == {"q"}
    with pytest.raises(ConfigError, match="a MappingGraph holds arrays and names, and does not run"):
        model(input_ids=IDS)


def test_peft_changes_the_model_that_it_wraps_and_this_does_not() -> None:
    base, ours_base = bases("llama")
    plain = ours_base(**GIVEN).logits
    with live():
        theirs = peft.get_peft_model(base, peft.LoraConfig(**LORA))
        scatter(theirs, 1)
    ours = hf.get_peft_model(ours_base, hf.LoraConfig(**LORA))
    hf.set_peft_model_state_dict(ours, tensors(peft.get_peft_model_state_dict(theirs)))
    same_output(base, ours, called("llama"))
    np.testing.assert_array_equal(ours_base(**GIVEN).logits, plain)
    np.testing.assert_array_equal(ours.get_base_model()(**GIVEN).logits, plain)


def test_question_answering_under_peft_loses_its_token_types() -> None:
    """transformers' model knows them, and so does ours under a LoRA; before a prompt they are refused."""
    base, ours_base = bases("questions")
    given = called("questions", token_type_ids=TYPES)
    same_output(base, ours_base, given)
    config: dict[str, Any] = {"r": 2, "target_modules": ["query"], "task_type": "QUESTION_ANS"}
    ours = hf.get_peft_model(ours_base, hf.LoraConfig(**config))
    same_output(base, ours, given, "a fresh LoRA changes nothing")
    with live(), torch.no_grad():
        theirs = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
        np.testing.assert_array_equal(theirs(**to_torch(given)).loss, theirs(**to_torch(called("questions"))).loss)
    with pytest.raises(ConfigError, match="token_type_ids with a PromptTuning for QUESTION_ANS: HF PEFT drops it"):
        prompted("questions", task_type="QUESTION_ANS")(**given)


def test_a_multitask_prompt_takes_decoder_input_ids() -> None:
    given = {**GIVEN, "decoder_input_ids": IDS[:, :3], "task_ids": np.asarray([1, 0])}
    base, ours_base = bases("t5")
    with live():
        theirs = peft.get_peft_model(base, peft.MultitaskPromptTuningConfig(**MULTITASK))
        with pytest.raises(TypeError):
            theirs(**to_torch(given))
    assert hf.get_peft_model(ours_base, hf.MultitaskPromptTuningConfig(**MULTITASK))(**given).logits.shape == (2, 5, 17)


def test_a_prompts_file_names_the_head_of_its_task_once(tmp_path: Path) -> None:
    said = {"num_virtual_tokens": 2, "task_type": "SEQ_CLS"}
    base, ours_base = bases("classifier")
    peft.get_peft_model(base, peft.PromptTuningConfig(**said)).save_pretrained(tmp_path / "theirs")
    hf.get_peft_model(ours_base, hf.PromptTuningConfig(**said)).save_pretrained(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("theirs", "ours"))
    assert theirs.pop("modules_to_save") == 2 * ours.pop("modules_to_save") == 2 * ["classifier", "score"]
    assert theirs == ours


def test_what_is_written_into_a_configuration_is_saved_where_it_computes_nothing(tmp_path: Path) -> None:
    model = tuned()
    model.peft_config["default"].base_model_name_or_path = "elsewhere"
    model.save_pretrained(tmp_path)
    assert hf.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "elsewhere"
    model.peft_config["default"].lora_alpha = 3
    with pytest.raises(ConfigError, match="lora_alpha was changed to 3 after the adapter was made"):
        model.save_pretrained(tmp_path)


def test_a_newer_pefts_keys_are_kept(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "adapter_config.json"
    text = json.dumps({**json.loads(path.read_text()), "zzz_new": [1]}, indent=2)
    path.write_text(text)
    hf.PeftModel.from_pretrained(bases("llama")[1], tmp_path / "old").save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "adapter_config.json").read_text() == text
    with pytest.warns(UserWarning, match="zzz_new"):
        peft.PeftConfig.from_pretrained(tmp_path / "old")


def test_another_configuration_for_a_files_tensors(tmp_path: Path) -> None:
    model = tuned()
    key = next(key for key in numbers(model) if "lora_B" in key)
    hf.set_peft_model_state_dict(model, {**numbers(model), key: 0.1 + numbers(model)[key]})
    model.save_pretrained(tmp_path)
    base, ours_base = bases("llama")
    with live():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path, config=peft.LoraConfig(**LORA, lora_alpha=31))
    ours = hf.PeftModel.from_pretrained(ours_base, tmp_path, config=hf.LoraConfig(**LORA, lora_alpha=31))
    same_output(theirs.eval(), ours, called("llama"))


def test_an_adapter_knows_its_model(tmp_path: Path) -> None:
    base, _ = bases("llama")
    base.save_pretrained(tmp_path / "base")
    ours_base = hf.BaseModel.from_pretrained(tmp_path / "base")
    config = hf.LoraConfig(**LORA, base_model_name_or_path="another")
    hf.get_peft_model(bases("llama")[1], config)
    assert config.base_model_name_or_path == "another"  # PEFT makes it null
    model = hf.get_peft_model(ours_base, config)
    model.save_pretrained(tmp_path / "adapter")
    assert hf.PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "base")
    again = hf.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    np.testing.assert_array_equal(again(**GIVEN).logits, model(**GIVEN).logits)
    with pytest.raises(ConfigError, match="is for task_type='SEQ_CLS', the adapter's is 'CAUSAL_LM'"):
        hf.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_tensors_of_a_lazily_loaded_adapter_stay_in_the_file(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    model = hf.PeftModel.from_pretrained(bases("llama")[1], tmp_path, low_cpu_mem_usage=True)
    assert type(model.state.adapted.adapters["default"].modules).__name__ == "LazyModules"
    assert model(**GIVEN).logits.shape == (2, 5, 17)


ENCODED: dict[str, Any] = {**PROMPT, "encoder_hidden_size": 4}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "attentions": (lambda: tuned()(IDS, output_attentions=True), "output_attentions: not built here"),
    "tuple": (lambda: tuned()(IDS, return_dict=False), "return_dict=False: not built"),
    "task ids": (lambda: tuned()(IDS, task_ids=np.zeros(2)), "task_ids are for a multitask prompt"),
    "no inputs": (lambda: prompted()(), "needs input_ids or inputs_embeds"),
    "labels of rows": (lambda: tuned()(IDS, labels=IDS, adapter_names=["default"] * 2), "labels with adapter_names"),
    "rows of prompts": (lambda: prompted()(IDS, adapter_names=["default"] * 2), "adapter_names with prompts"),
    "positions of a prompt": (lambda: prompted()(IDS, position_ids=np.arange(5)[None, :]), "position_ids with a PromptTuning"),
    "merged prompt": (lambda: prompted().merge_adapter(), "merge_adapter: a prompt is in no layer's weight"),
    "status of a prompt": (lambda: prompted().get_layer_status(), "get_layer_status: a prompt is in no layer"),
    "two prompts": (lambda: prompted().set_adapter(["default", "default"]), "2 prompts at once"),
    "a prompt without a task": (lambda: prompted(task_type=None), "task_type=None: a prompt is put before the inputs of a task"),
    "a prompt beside LoRA": (lambda: tuned().add_adapter("b", hf.PromptTuningConfig(**PROMPT)), "PROMPT_TUNING beside LORA"),
    "another task": (lambda: hf.PeftModelForSeq2SeqLM(bases("llama")[1], hf.LoraConfig(**LORA)), "is for task_type='SEQ_2_SEQ_LM'"),
    "twice": (
        lambda: hf.get_peft_model(hf.inject_adapter_in_model(hf.LoraConfig(**LORA), bases("llama")[1]), hf.LoraConfig(**LORA)),
        "already",
    ),
    "empty": (lambda: hf.get_peft_model(bases("llama")[1], hf.LoraConfig(**LORA), low_cpu_mem_usage=True), "drawn at once"),
    "eva": (lambda: tuned(init_lora_weights="eva"), "starts from data"),
    "pissa_niter": (lambda: tuned(init_lora_weights="pissa_niter_4"), "Use 'pissa', which is exact"),
    "alora": (lambda: hf.LoraConfig(alora_invocation_tokens=[1]), "aLoRA adapts"),
    "loftq": (lambda: tuned(init_lora_weights="loftq", loftq_config={"loftq_bits": 3}), "there are 4, which is nf4, and 8"),
    "corda": (lambda: tuned(init_lora_weights="corda"), "starts from data"),
    "no number": (lambda: hf.LoraConfig(r="many"), "r='many' is of type str"),
    "no method": (lambda: hf.get_peft_config({"peft_type": "LILY"}), "peft_type='LILY' has no configuration class here"),
    "no field": (lambda: hf.get_peft_config({"peft_type": "LORA", "rank": 3}), "LoraConfig has no rank"),
    "no method of its own": (lambda: hf.PeftConfig().frozen(), "PeftConfig is no method"),
    "pickle": (lambda: tuned().save_pretrained("/nowhere", safe_serialization=False), "safe_serialization=False: not built"),
    "unknown adapter": (lambda: tuned().save_pretrained("/nowhere", selected_adapters=["b"]), "there is no adapter 'b'"),
    "device": (lambda: tuned().load_adapter("/nowhere", "b", torch_device="cuda"), "torch_device: not built here"),
    "driver": (lambda: tuned().add_weighted_adapter(["default"], [1.0], "b", svd_driver="gesvd"), "svd_driver: not built"),
    "encoder": (lambda: renumbered(hf.PromptEncoderConfig(**ENCODED)), "has an encoder, which a file's tensors know nothing of"),
    "a tensor too few": (lambda: hf.set_peft_model_state_dict(tuned(), {}), "lora_A.weight, lora_B.weight missing"),
    "trained on": (
        lambda: prompted().state.attached("b", prompted().state.file("default", "auto"), True, "refuse"),
        "has lost its encoder",
    ),
}


def renumbered(config: Any) -> None:
    model = hf.get_peft_model(bases("llama")[1], config)
    hf.set_peft_model_state_dict(model, numbers(model))


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_honoured_is_an_error_that_says_so(what: str) -> None:
    ask, message = REFUSED[what]
    with pytest.raises(PeftRefError, match=message):
        ask()


def test_an_unknown_argument_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="rank"):
        hf.LoraConfig(rank=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue] - the point of the test
    with pytest.raises(KeyMismatchError, match="missing"):
        hf.set_peft_model_state_dict(tuned(), {})
