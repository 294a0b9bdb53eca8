"""The quirks of prompts on the spec's pages, seen in HF PEFT run live on tiny models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import MultitaskPromptTuningConfig, PromptTuningConfig  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from tests.hf.tiny_models import received, tiny  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]

N = 3
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prompted(task: str, model: str = "", **more: Any) -> Any:
    """A tiny model of the task with a prompt of N tokens."""
    return peft.get_peft_model(tiny(model or task), PromptTuningConfig(task_type=task, num_virtual_tokens=N, **more)).eval()


def multitask(task: str, **more: Any) -> Any:
    config = MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=N, num_ranks=2, **{"num_tasks": 3, **more})
    return peft.get_peft_model(tiny(task), config).eval()


def encoder(model: Any) -> Any:
    return model.prompt_encoder["default"]


def test_prompttuning_q1_without_a_task_type_the_prompt_is_never_used(tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=N)
    with pytest.raises(KeyError):
        peft.get_peft_model(tiny("FEATURE_EXTRACTION"), config)
    base = tiny("FEATURE_EXTRACTION")
    made = peft.PeftModel(base, config)
    made.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    for model in (made, loaded):
        assert model.get_prompt(2).shape == (2, N, 8)
        assert torch.equal(model(input_ids=IDS).last_hidden_state, base(input_ids=IDS).last_hidden_state)


def test_prompttuning_q2_question_answering_drops_types_and_positions_in_silence() -> None:
    more = {"token_type_ids": IDS % 2, "position_ids": IDS % 4}
    answering, classifying = prompted("QUESTION_ANS"), prompted("SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = received(answering, input_ids=IDS, **more)
    assert not {"token_type_ids", "position_ids"} & seen.keys()
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        seen = received(classifying, input_ids=IDS, **more)
    assert seen["token_type_ids"].tolist() == [[0] * N + row for row in (IDS % 2).tolist()]


def test_prompttuning_q3_start_and_end_are_not_moved_on() -> None:
    made, start, end = prompted("QUESTION_ANS"), torch.tensor([0, 1]), torch.tensor([2, 3])
    out = made(input_ids=IDS, start_positions=start, end_positions=end)

    def loss(moved: int) -> Any:
        return (cross_entropy(out.start_logits, start + moved) + cross_entropy(out.end_logits, end + moved)) / 2

    assert torch.isclose(out.loss, loss(0))
    assert not torch.isclose(out.loss, loss(N))


def test_prompttuning_q4_labels_of_token_classification_raise() -> None:
    made = prompted("TOKEN_CLS")
    assert made(input_ids=IDS).logits.shape == (2, N + 4, 2)
    with pytest.raises(ValueError, match="batch_size"):
        made(input_ids=IDS, labels=IDS % 2)


def test_prompttuning_q5_the_mask_becomes_floating_point() -> None:
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        seen = received(prompted("CAUSAL_LM"), input_ids=IDS, attention_mask=torch.ones_like(IDS))
        assert seen["attention_mask"].dtype == dtype


def test_prompttuning_q6_half_of_an_encoder_decoders_table_is_dead() -> None:
    made = prompted("SEQ_2_SEQ_LM")
    made(input_ids=IDS, labels=IDS).loss.backward()
    gradient = encoder(made).embedding.weight.grad
    assert gradient[:N].abs().min() > 0
    assert not gradient[N:].any()
    assert peft.get_peft_model_state_dict(made)["prompt_embeddings"].shape == (2 * N, 8)


def test_prompttuning_q7_an_unknown_start_draws_at_random() -> None:
    torch.manual_seed(1)
    known = encoder(prompted("CAUSAL_LM")).embedding.weight
    torch.manual_seed(1)
    assert torch.equal(encoder(prompted("CAUSAL_LM", prompt_tuning_init="FROM_THE_MOON")).embedding.weight, known)


def test_prompttuning_q8_a_classifier_of_the_last_token_takes_padding_for_it() -> None:
    base = tiny("gpt2-classifier")  # its pad token is 0
    short, padded = torch.tensor([[3, 4, 5]]), torch.tensor([[3, 4, 5, 0, 0]])
    mask = (padded > 0).long()

    def answers(model: Any) -> tuple[Any, Any]:
        return model(input_ids=short, attention_mask=mask[:, :3]).logits, model(input_ids=padded, attention_mask=mask).logits

    assert torch.allclose(*answers(base))
    made = peft.get_peft_model(base, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=N)).eval()
    without, with_padding = answers(made)
    assert (without - with_padding).abs().max() > 1e-3


def test_prompttuning_q9_rows_are_those_of_the_embedding_module_in_float32() -> None:
    made = prompted("CAUSAL_LM", "gemma3", prompt_tuning_init="SAMPLE_VOCAB")
    rows, words = encoder(made).embedding.weight, made.get_input_embeddings().weight
    assert rows.dtype == torch.float32

    def nearest(scale: float) -> Any:
        return (rows.double()[:, None] - scale * words[None]).abs().amax(2).amin(1).max()

    assert nearest(8**0.5) < 1e-6 < 1e-3 < nearest(1.0)


def test_prompttuning_q10_a_saved_prompt_cannot_be_trained_on(tmp_path: Path) -> None:
    prompted("CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(tiny("CAUSAL_LM"), tmp_path, is_trainable=True)


@pytest.mark.parametrize("task", ["QUESTION_ANS", "FEATURE_EXTRACTION"])
def test_multitaskprompttuning_q1_task_ids_are_not_handed_on(task: str) -> None:
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        multitask(task)(input_ids=IDS, task_ids=torch.tensor([0, 1]))
    multitask("TOKEN_CLS")(input_ids=IDS, task_ids=torch.tensor([0, 1]))


def test_multitaskprompttuning_q2_one_id_serves_the_whole_batch() -> None:
    made = multitask("CAUSAL_LM")
    assert torch.equal(made.get_prompt(4, torch.tensor([2])), made.get_prompt(4, torch.tensor([2, 2, 2, 2])))
    for batch, ids in ((4, [2, 1]), (1, [2, 1])):
        with pytest.raises(RuntimeError):
            made.get_prompt(batch, torch.tensor(ids))


def test_multitaskprompttuning_q3_decoder_input_ids_raise() -> None:
    made, ids = multitask("SEQ_2_SEQ_LM"), torch.tensor([0, 2])
    assert made(input_ids=IDS, labels=IDS, task_ids=ids).logits.shape[1] == N + 4
    with pytest.raises(TypeError, match="NoneType"):
        made(input_ids=IDS, decoder_input_ids=IDS, task_ids=ids)


def test_multitaskprompttuning_q4_with_one_submodule_the_decoders_inputs_are_lost() -> None:
    made, ids = multitask("SEQ_2_SEQ_LM", num_transformer_submodules=1), torch.tensor([0, 2])
    embeds = torch.randn(2, 4, 8)
    seen = received(made, input_ids=IDS, labels=IDS, decoder_inputs_embeds=embeds, task_ids=ids)
    assert "decoder_inputs_embeds" not in seen
    assert seen["labels"].tolist() == IDS.tolist()
    with pytest.raises(ValueError, match="exactly one of"):
        made(input_ids=IDS, decoder_inputs_embeds=embeds, task_ids=ids)
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1]])
    inputs = {"input_ids": IDS, "labels": IDS, "decoder_attention_mask": mask, "task_ids": ids}
    seen = received(made, **inputs)
    longer = torch.cat([torch.ones(2, N), mask], dim=1)
    assert torch.equal(seen["decoder_attention_mask"], longer)
    cut = made.base_model(**{**seen, "decoder_attention_mask": longer[:, :4]}).logits
    right = made.base_model(**{**seen, "decoder_attention_mask": mask}).logits
    assert torch.equal(made(**inputs).logits, cut)
    assert (cut - right).abs().max() > 1e-3


def test_multitaskprompttuning_q5_generate_leaves_the_decoders_rows_out() -> None:
    made, ids = multitask("SEQ_2_SEQ_LM"), torch.tensor([0, 2])
    entered: list[Any] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        entered.append(kwargs)

    made.base_model.decoder.register_forward_pre_hook(note, with_kwargs=True)
    made(input_ids=IDS, labels=IDS, task_ids=ids)
    assert entered[0]["inputs_embeds"].shape == (2, N + 4, 8)
    entered.clear()
    made.generate(input_ids=IDS, task_ids=ids, max_new_tokens=2)
    assert entered
    assert all(kwargs["input_ids"].shape == (2, 1) and kwargs.get("inputs_embeds") is None for kwargs in entered)


def test_multitaskprompttuning_q6_the_source_is_needed_again_to_load(tmp_path: Path) -> None:
    multitask("CAUSAL_LM").save_pretrained(tmp_path / "source")
    source = tmp_path / "source/adapter_model.safetensors"
    made = multitask("CAUSAL_LM", prompt_tuning_init="ONLY_SOURCE_SHARED", prompt_tuning_init_state_dict_path=str(source))
    encoder(made).embedding.weight.data += 1
    made.save_pretrained(tmp_path / "own")
    loaded = peft.PeftModel.from_pretrained(tiny("CAUSAL_LM"), tmp_path / "own")
    assert torch.equal(encoder(loaded).embedding.weight, encoder(made).embedding.weight)
    source.unlink()
    with pytest.raises(FileNotFoundError):
        peft.PeftModel.from_pretrained(tiny("CAUSAL_LM"), tmp_path / "own")


def test_multitaskprompttuning_q7_a_negative_source_task_counts_from_the_end(tmp_path: Path) -> None:
    source = multitask("CAUSAL_LM")
    source.save_pretrained(tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    start = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": path, "num_tasks": 1}
    made = multitask("CAUSAL_LM", prompt_tuning_init_task=-1, **start)
    assert torch.equal(encoder(made).prefix_task_cols[0], encoder(source).prefix_task_cols[2])
