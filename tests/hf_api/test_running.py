"""Models that run, without torch: on arrays that know the standard alone, in float32, and with tied weights."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_ref import hf
from peft_ref.errors import NotMergeableError
from peft_ref.nn import ModelGraph, model_of

strict = pytest.importorskip("array_api_strict")

SIZES = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
CLASSIFIER: dict[str, Any] = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    **SIZES,
    "max_position_embeddings": 9,
}
IDS = np.asarray([[3, 1, 4], [1, 5, 0]])
CONFIGS = {
    "lora": lambda: hf.LoraConfig(target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "ia3": lambda: hf.IA3Config(task_type="CAUSAL_LM"),
    "prompt": lambda: hf.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB"),
    "prefix": lambda: hf.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", prefix_projection=True),
}


def base(config: dict[str, Any] = LLAMA, library: Any = np, dtype: str = "float64", **more: Any) -> hf.BaseModel:
    rng, config = np.random.default_rng(0), {**config, **more}
    model = model_of(config)
    weights = {name: library.asarray(rng.normal(size=shape).astype(dtype)) for name, shape in model.shapes().items()}
    return hf.BaseModel(ModelGraph(model=model, weights=weights, model_config=config))


@pytest.mark.parametrize("kind", CONFIGS)
def test_other_arrays_than_numpys(kind: str, tmp_path: Path) -> None:
    models = [hf.get_peft_model(base(library=library), CONFIGS[kind](), rng=3) for library in (np, strict)]
    expected, got = (model(library.asarray(IDS), library.ones(IDS.shape)) for model, library in zip(models, (np, strict), strict=True))
    np.testing.assert_allclose(np.asarray(got.logits), expected.logits, rtol=1e-12)
    models[1].save_pretrained(tmp_path)
    read = hf.PeftModel.from_pretrained(base(library=strict), tmp_path)(strict.asarray(IDS))
    np.testing.assert_allclose(np.asarray(read.logits), expected.logits, rtol=1e-12)
    if kind == "lora":
        rows = models[1](strict.asarray(IDS), adapter_names=["__base__", "default"]).logits
        np.testing.assert_allclose(np.asarray(rows)[1], expected.logits[1], rtol=1e-12)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_in_float32_stays_in_it(kind: str) -> None:
    model = hf.get_peft_model(base(dtype="float32"), CONFIGS[kind]())
    assert {tensor.dtype for tensor in hf.get_peft_model_state_dict(model).values()} == {np.dtype("float32")}
    assert model(IDS).logits.dtype == np.float32


def lora_on_the_head() -> Any:
    model = hf.get_peft_model(base(tie_word_embeddings=True), hf.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    assert model.state.base.tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    return model


def test_a_merge_into_a_tied_weight_asks_what_becomes_of_the_table() -> None:
    model = lora_on_the_head()
    with pytest.raises(NotMergeableError, match="Give ties='untie' to part them, or 'share'"):
        model.merge_and_unload()
    apart = model.merge_and_unload(ties="untie")
    np.testing.assert_allclose(apart(IDS).logits, model(IDS).logits, rtol=1e-9, atol=1e-12)
    shared = model.merge_and_unload(ties="share")
    assert np.max(np.abs(shared(IDS).logits - model(IDS).logits)) > 1e-3
    np.testing.assert_array_equal(shared.graph.weight("lm_head.weight"), shared.graph.weight("model.embed_tokens.weight"))


def test_an_unloaded_model_is_wrapped_again() -> None:
    model = lora_on_the_head()
    merged = model.merge_and_unload(ties="untie")
    again = hf.get_peft_model(merged, hf.IA3Config())
    np.testing.assert_allclose(again(IDS).logits, model(IDS).logits, rtol=1e-9, atol=1e-12)


def test_a_copy_of_a_tied_head_is_the_heads_alone() -> None:
    config = hf.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = hf.get_peft_model(base(tie_word_embeddings=True), config)
    before, tensors = model(IDS).logits, hf.get_peft_model_state_dict(model)
    head = "base_model.model.lm_head.weight"
    hf.set_peft_model_state_dict(model, {**tensors, head: 2 * tensors[head]})
    np.testing.assert_allclose(model(IDS).logits, 2 * before, rtol=1e-12)  # logits are linear in the head; the table is what it was


def test_a_prompt_that_starts_from_a_text_asks_for_a_tokenizer() -> None:
    config = hf.PromptTuningConfig(
        num_virtual_tokens=3,
        task_type="CAUSAL_LM",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="two words",
        tokenizer_name_or_path="anything",
    )
    model = hf.get_peft_model(base(), config, tokenize=lambda text: [len(word) for word in text.split()])
    words = model.state.base.weight("model.embed_tokens.weight")
    np.testing.assert_array_equal(model.get_prompt(1)[0], words[[3, 5, 3]])
    with pytest.raises(ValueError, match="needs a tokenizer"):
        hf.get_peft_model(base(), config)


def test_a_pruned_combination_is_the_same_each_time() -> None:
    def combined(**more: Any) -> Any:
        model = hf.get_peft_model(base(), hf.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
        model.add_adapter("other", hf.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", "dare_linear", density=0.5, **more)
        return hf.get_peft_model_state_dict(model, adapter_name="both")

    first, again, other = combined(), combined(), combined(rng=7)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert any(not np.array_equal(first[key], other[key]) for key in first)


def test_a_prompt_of_a_classifier_brings_its_head_and_the_types_of_its_tokens() -> None:
    """With one virtual token of type 0 whose embedding is a word's, the model is the plain one on that word and the others."""
    plain = base(CLASSIFIER)
    model = hf.get_peft_model(plain, hf.PromptTuningConfig(num_virtual_tokens=1, task_type="SEQ_CLS"))
    table = plain.graph.weight("bert.embeddings.word_embeddings.weight")[2:3]
    hf.set_peft_model_state_dict(model, {**hf.get_peft_model_state_dict(model), "prompt_embeddings": table})
    types = np.asarray([[0, 1, 1], [1, 0, 1]])
    front = np.asarray([[2], [2]])
    expected = plain(np.concatenate([front, IDS], axis=1), token_type_ids=np.concatenate([0 * front, types], axis=1))
    np.testing.assert_allclose(model(IDS, token_type_ids=types).logits, expected.logits, rtol=1e-12)


def test_a_model_and_what_is_on_it_are_said() -> None:
    model = hf.get_peft_model(base(), CONFIGS["ia3"]())
    assert repr(model.eval()) == "PeftModelForCausalLM(BaseModel(LlamaForCausalLM), default=IA3)"
    with redirect_stdout(io.StringIO()) as out:
        model.print_trainable_parameters()
    trainable, total = model.get_nb_trainable_parameters()
    assert out.getvalue() == f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}\n"
