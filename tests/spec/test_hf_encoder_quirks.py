"""Every quirk of prefix tuning and P-tuning, seen in HF PEFT run live. One that a newer PEFT has lost fails here, and leaves its page."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import PrefixTuningConfig, PromptEncoderConfig  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
N = 3
X = torch.tensor([[1, 2, 3, 4, 5]])
LLAMA = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
T5 = {"vocab_size": 17, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 4, "num_heads": 4, "decoder_start_token_id": 0}


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def llama(cls: str = "LlamaForCausalLM", **more: Any) -> Any:
    return getattr(transformers, cls)(transformers.LlamaConfig(**{**LLAMA, **more})).eval()


def t5(**more: Any) -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**{**T5, **more})).eval()


def prefix(base: Any, task: str = "CAUSAL_LM", **more: Any) -> Any:
    return peft.get_peft_model(base, PrefixTuningConfig(task_type=task, num_virtual_tokens=N, **more)).eval()


def p_tuning(base: Any, task: str = "CAUSAL_LM", **more: Any) -> Any:
    sizes = {"encoder_hidden_size": 5, **more}
    return peft.get_peft_model(base, PromptEncoderConfig(task_type=task, num_virtual_tokens=N, **sizes)).eval()


def encoder(model: Any) -> Any:
    return model.prompt_encoder["default"]


def rows(model: Any) -> Any:
    return encoder(model).embedding.weight


def loss_of_decoder(model: Any) -> Any:
    return model(input_ids=X, labels=X).loss


def used_slots(model: Any) -> list[bool]:
    """Of every slot of a prefix, whether the loss depends on it."""
    loss_of_decoder(model).backward()
    found = model.peft_config["default"]
    by_slot = rows(model).grad.view(N, 2 * found.num_layers, -1).abs().sum((0, 2))
    return [bool(size > 0) for size in by_slot]


def calls_it_cache(model: Any) -> bool:
    """Whether these transformers have renamed `past_key_values`, which PEFT 0.21.2 looks for by name."""
    return "past_key_values" not in inspect.signature(model.forward).parameters


# ---- prefix tuning


def test_prefixtuning_q1_an_encoder_decoder_uses_half_of_an_even_table_twice() -> None:
    made = prefix(t5(), "SEQ_2_SEQ_LM")
    layers = made.get_prompt(1).self_attention_cache.layers
    slots = rows(made).view(N, 8, 4, 4).permute(1, 2, 0, 3)
    for layer, (key, value) in enumerate([(0, 1), (4, 5), (0, 1), (4, 5)]):
        assert torch.equal(layers[layer].keys[0], slots[key])
        assert torch.equal(layers[layer].values[0], slots[value])
    assert used_slots(made) == [True, True, False, False] * 2


def test_prefixtuning_q2_of_an_odd_number_of_layers_every_slot_is_used_in_another_order() -> None:
    made = prefix(t5(num_layers=3), "SEQ_2_SEQ_LM")
    layers = made.get_prompt(1).self_attention_cache.layers
    slots = rows(made).view(N, 6, 4, 4).permute(1, 2, 0, 3)
    assert all(torch.equal(layers[l].keys[0], slots[k]) for l, k in enumerate((0, 4, 2)))
    assert all(used_slots(made))


def test_prefixtuning_q3_with_one_submodule_every_decoder_layer_has_its_own_slots() -> None:
    made = prefix(t5(), "SEQ_2_SEQ_LM", num_transformer_submodules=1)
    slots = rows(made).view(N, 8, 4, 4).permute(1, 2, 0, 3)
    for layer, held in enumerate(made.get_prompt(1).layers):
        assert torch.equal(held.keys[0], slots[2 * layer])
    assert all(used_slots(made))


def test_prefixtuning_q4_encoder_and_cross_attention_get_nothing() -> None:
    base = t5()
    before = base.encoder(X).last_hidden_state
    made = prefix(base, "SEQ_2_SEQ_LM")
    assert torch.allclose(made(input_ids=X, labels=X).encoder_last_hidden_state, before, rtol=1e-12, atol=1e-12)
    assert made.get_prompt(1).cross_attention_cache.get_seq_length() == 0


def test_prefixtuning_q5_a_zero_prefix_is_not_a_no_op() -> None:
    base = llama()
    before = base(X).logits
    made = prefix(base, init_weights="zero")
    assert not rows(made).any()
    assert (made(X).logits - before).abs().max() > 1e-3


def test_prefixtuning_q6_any_other_start_draws_at_random() -> None:
    torch.manual_seed(1)
    known = rows(prefix(llama()))
    torch.manual_seed(1)
    assert torch.equal(rows(prefix(llama(), init_weights="zeros")), known)


def test_prefixtuning_q7_given_sizes_are_overwritten_where_keys_have_their_own_heads() -> None:
    found = prefix(llama(), token_dim=40, num_attention_heads=8).peft_config["default"]
    assert (found.token_dim, found.num_attention_heads) == (8, 2)
    config = transformers.GPT2Config(vocab_size=17, n_embd=16, n_layer=2, n_head=4)
    found = prefix(transformers.GPT2LMHeadModel(config), token_dim=40, num_attention_heads=8).peft_config["default"]
    assert (found.token_dim, found.num_attention_heads) == (40, 8)


def test_prefixtuning_q8_the_key_size_of_t5_is_not_asked() -> None:
    made = prefix(t5(d_kv=8), "SEQ_2_SEQ_LM")
    assert made.peft_config["default"].token_dim == 16  # heads of 4, and T5's are of 8
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        loss_of_decoder(made)


def test_prefixtuning_q9_the_layers_counted_are_the_encoders() -> None:
    deeper, flatter = prefix(t5(num_layers=2, num_decoder_layers=4), "SEQ_2_SEQ_LM"), prefix(t5(num_decoder_layers=1), "SEQ_2_SEQ_LM")
    assert deeper.peft_config["default"].num_layers == 2
    with pytest.raises(IndexError):
        loss_of_decoder(deeper)
    assert used_slots(flatter) == [True] * 2 + [False] * 6


def test_prefixtuning_q10_gradient_checkpointing_is_refused_only_beforehand() -> None:
    base = llama()
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        prefix(base)
    base = llama()
    made = prefix(base)
    base.gradient_checkpointing_enable()
    made.train()
    with pytest.raises(RuntimeError, match="size of tensor"):
        made(input_ids=X, attention_mask=torch.ones_like(X))


def test_prefixtuning_q11_a_projected_prefix_cannot_be_put_back() -> None:
    for projected in (False, True):
        made = prefix(llama(), prefix_projection=projected)
        saved = peft.get_peft_model_state_dict(made)
        if projected:
            with pytest.raises(RuntimeError, match="size mismatch"):
                peft.set_peft_model_state_dict(made, saved)
        else:
            peft.set_peft_model_state_dict(made, saved)
            assert torch.equal(rows(made), saved["prompt_embeddings"])


def test_prefixtuning_q12_a_loaded_prefix_still_asks_for_gradients(tmp_path: Path) -> None:
    prefix(llama(), prefix_projection=True).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.peft_config["default"].inference_mode
    loaded(input_ids=X, labels=X).loss.backward()
    assert rows(loaded).requires_grad
    assert rows(loaded).grad.abs().min() > 0


def test_prefixtuning_q13_classification_is_refused_where_models_say_cache() -> None:
    base = llama("LlamaForSequenceClassification")
    made = prefix(base, "SEQ_CLS")
    if calls_it_cache(base) and calls_it_cache(base.model):
        with pytest.raises(ValueError, match="does not support past key values"):
            made(input_ids=X)
    else:
        assert made(input_ids=X).logits.shape == (1, 2)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_prefixtuning_q14_generate_loses_the_prefix_where_models_say_cache(family: str) -> None:
    """The model is handed two caches, and takes the empty one."""
    base, task = (llama(), "CAUSAL_LM") if family == "llama" else (t5(), "SEQ_2_SEQ_LM")
    made = prefix(base, task)
    rows(made).data *= 10
    seen: list[Any] = []
    options = {"input_ids": X, "max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with made.disable_adapter():
        plain = base.generate(**options).logits[0]
    watch = base.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    got = made.generate(**options).logits[0]
    watch.remove()
    if calls_it_cache(base):
        assert {"cache", "past_key_values"} <= seen[0].keys()
        assert torch.equal(got, plain)
    else:
        assert (got - plain).abs().max() > 1e-3


def test_prefixtuning_q15_a_sliding_window_leaves_the_prefix_behind() -> None:
    sizes = {**LLAMA, "num_hidden_layers": 1, "sliding_window": 4}
    made = prefix(transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval())
    reached = []
    for token in range(X.shape[1]):
        made.zero_grad()
        made(X).logits[0, token].sum().backward()
        reached.append(int((rows(made).grad.abs().sum(1) > 0).sum()))
    assert reached == [3, 2, 1, 0, 0]


# ---- P-tuning


def test_ptuning_q1_an_mlps_layers_are_three_and_the_warning_says_two() -> None:
    for layers in (2, 5):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            made = p_tuning(llama(), encoder_num_layers=layers)
        dense = [module for module in encoder(made).mlp_head if isinstance(module, torch.nn.Linear)]
        assert len(dense) == 3
        assert any("Exactly 2 MLP layers are used" in str(w.message) for w in heard) == (layers == 5)


def test_ptuning_q2_an_mlp_has_no_dropout_and_nobody_says_so() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        made = p_tuning(llama(), encoder_dropout=0.9).train()
    assert not any("dropout" in str(w.message) for w in heard)
    assert torch.equal(made.get_prompt(1), made.get_prompt(1))


def test_ptuning_q3_a_checkpoint_put_into_a_model_in_training_goes_through_the_encoder_again() -> None:
    for kind in ("MLP", "LSTM"):
        made = p_tuning(llama(), encoder_reparameterization_type=kind)
        saved = peft.get_peft_model_state_dict(made)
        peft.set_peft_model_state_dict(made, saved)
        assert torch.equal(rows(made), saved["prompt_embeddings"])
        again = peft.get_peft_model_state_dict(made)["prompt_embeddings"]
        assert (again - saved["prompt_embeddings"]).abs().max() > 1e-3


def test_ptuning_q4_what_is_saved_in_training_has_been_dropped() -> None:
    made = p_tuning(llama(), encoder_reparameterization_type="LSTM", encoder_dropout=0.5)
    made.train()
    once, twice = (peft.get_peft_model_state_dict(made)["prompt_embeddings"] for _ in range(2))
    assert (once - twice).abs().max() > 1e-4
    made.eval()
    once, twice = (peft.get_peft_model_state_dict(made)["prompt_embeddings"] for _ in range(2))
    assert torch.equal(once, twice)


def test_ptuning_q5_an_lstms_unused_rows_steer_the_others() -> None:
    for kind, steers in (("MLP", False), ("LSTM", True)):
        made = p_tuning(t5(), "SEQ_2_SEQ_LM", encoder_reparameterization_type=kind)
        loss_of_decoder(made).backward()
        assert rows(made).shape[0] == 2 * N
        assert bool((rows(made).grad[N:] != 0).any()) == steers


def test_ptuning_q6_a_loaded_encoder_cannot_be_called(tmp_path: Path) -> None:
    p_tuning(llama()).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert loaded.get_prompt(2).shape == (2, N, 16)
    with pytest.raises(AttributeError, match="mlp_head"):
        encoder(loaded)(torch.arange(N))


def test_ptuning_q7_without_its_own_size_an_encoder_takes_the_models() -> None:
    made = peft.get_peft_model(llama(), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N))
    assert encoder(made).mlp_head[0].weight.shape == (16, 16)
    # A prefix's takes what keys and values are left with: half, where four heads share two.
    assert encoder(prefix(llama(), prefix_projection=True)).transform[0].weight.shape == (8, 8)
