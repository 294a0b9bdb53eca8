"""The quirks of adaption prompts on the spec's page, and its numbers, seen in HF PEFT run live on tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.adaption_prompt import layer as peft_layer  # noqa: E402
from peft.tuners.adaption_prompt.layer import AdaptedAttention  # noqa: E402

from peft_ref.errors import ConfigError  # noqa: E402
from peft_ref.methods import AdaptionPrompt  # noqa: E402
from tests.spec.pages import METHOD_PAGES, run  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
GIVEN = {"adapter_len": 4, "adapter_layers": 2}
SIZES = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 3}


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(**{**SIZES, "pad_token_id": None, "attn_implementation": "eager", **more})
    return transformers.LlamaForCausalLM(config).eval()


def adapted(base: Any, **more: Any) -> Any:
    return peft.get_peft_model(base, peft.AdaptionPromptConfig(**{**GIVEN, "task_type": "CAUSAL_LM", **more})).eval()


def blocks(model: Any) -> list[int]:
    """The layers that have an adapter."""
    return [i for i, layer in enumerate(model.get_base_model().model.layers) if isinstance(layer.self_attn, AdaptedAttention)]


def test_adaptionprompt_q1_a_closed_gate_adds_the_bias_of_o_proj() -> None:
    def with_bias(size: float) -> Any:
        torch.manual_seed(7)
        base = llama(attention_bias=True)
        for layer in base.model.layers[1:]:
            layer.self_attn.o_proj.bias.data = size * torch.ones(12)
        return base

    once, twice = with_bias(1.0)(IDS).logits, with_bias(2.0)(IDS).logits
    torch.testing.assert_close(adapted(with_bias(1.0))(IDS).logits, twice)
    assert torch.max(torch.abs(twice - once)) > 1e-3
    assert torch.equal(adapted(with_bias(0.0))(IDS).logits, with_bias(0.0)(IDS).logits)


def test_adaptionprompt_q2_a_head_dim_of_its_own_raises() -> None:
    model = adapted(llama(head_dim=6, num_key_value_heads=1))
    with pytest.raises(RuntimeError, match="must match the size"):
        model(IDS)


def test_adaptionprompt_q3_no_layers_are_all_layers() -> None:
    assert blocks(adapted(llama())) == [1, 2]
    assert blocks(adapted(llama(), adapter_layers=0)) == [0, 1, 2]
    assert blocks(adapted(llama(), adapter_layers=-1)) == [1, 2]
    for wrong in (0, -1):
        with pytest.raises(ConfigError, match=f"adapter_layers={wrong}"):
            AdaptionPrompt(adapter_layers=wrong)


@pytest.mark.parametrize("name", GIVEN)
def test_adaptionprompt_q4_what_must_be_given_raises_from_elsewhere(name: str) -> None:
    with pytest.raises(TypeError, match="NoneType"):
        adapted(llama(), **{name: None})


def test_adaptionprompt_q5_the_softmax_is_float32() -> None:
    seen: list[Any] = []
    original = torch.nn.functional.softmax

    def watched(x: Any, *args: Any, **options: Any) -> Any:
        seen.append((x.dtype, options.get("dtype")))
        return original(x, *args, **options)

    model = adapted(llama())
    torch.nn.functional.softmax = watched
    try:
        model(IDS)
    finally:
        torch.nn.functional.softmax = original
    assert {narrow for wide, narrow in seen if wide == torch.float64} == {torch.float32}


def test_adaptionprompt_q6_the_weights_that_come_back_are_those_of_the_tokens() -> None:
    base = llama()
    before = base(IDS, output_attentions=True).attentions
    model = adapted(base)
    for name, p in model.named_parameters():
        if "adaption_" in name:
            p.data = torch.randn_like(p)
    after = model(IDS, output_attentions=True).attentions
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[2], before[2])  # what block 1 added reaches block 2
    torch.testing.assert_close(torch.sum(after[2], dim=-1), torch.ones(2, 3, 4), rtol=0, atol=1e-6)


def test_adaptionprompt_q7_a_list_of_targets_finds_nothing() -> None:
    with pytest.raises(ValueError, match="more adapter layers '2' than the model has '0'"):
        adapted(llama(), target_modules=["self_attn"])


@pytest.mark.parametrize("name", ["merge_and_unload", "merge_adapter", "unload"])
def test_adaptionprompt_q8_merging_is_unknown_to_the_base_model(name: str) -> None:
    with pytest.raises(AttributeError, match=f"'LlamaForCausalLM' object has no attribute '{name}'"):
        getattr(adapted(llama()), name)


def test_adaptionprompt_q9_a_prompt_of_no_rows_is_accepted() -> None:
    base = llama()
    before = base(IDS).logits
    model = adapted(base, adapter_len=0)
    for name, p in model.named_parameters():
        if "adaption_gate" in name:
            p.data = torch.ones(1)
    torch.testing.assert_close(model(IDS).logits, before)
    with pytest.raises(ConfigError, match="adapter_len=0"):
        AdaptionPrompt(adapter_len=0)


def test_adaptionprompt_q10_what_acts_is_counted_as_trained() -> None:
    """tests/hf_api/test_adaption.py counts ours beside it."""
    model = adapted(llama(), inference_mode=True)
    model.add_adapter("other", peft.AdaptionPromptConfig(adapter_len=1, adapter_layers=1, task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0] == 2 * (4 * 12 + 1)
    model.set_adapter("other")
    assert model.get_nb_trainable_parameters()[0] == 12 + 1
    with model.disable_adapter():
        assert model.get_nb_trainable_parameters()[0] == 0


def test_adaptionprompt_q11_names_of_rows_are_ignored() -> None:
    model = adapted(llama(attention_bias=True))
    for name, p in model.named_parameters():
        if "adaption_gate" in name:
            p.data = torch.ones(1)
    assert torch.equal(model(IDS, adapter_names=["__base__", "default"]).logits, model(IDS).logits)


def test_the_numbers_on_the_page_are_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, ran = run(METHOD_PAGES["adaption_prompt"])
    p, w, q, dy, back = (ran.names[name] for name in ("p", "w", "q", "dy", "back"))

    class Silent(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.config, self.head_dim = SimpleNamespace(hidden_size=2, num_attention_heads=2), 1
            for name, part in (("q", None), ("k", w.k), ("v", w.v), ("o", w.o)):
                layer = torch.nn.Linear(2, 2 if part is None else len(part.W), bias=False)
                if part is not None:
                    layer.weight.data = torch.tensor(part.W)
                self.add_module(f"{name}_proj", layer)

        def forward(self, hidden_states: Any) -> Any:
            return hidden_states, None

    module, leaf = AdaptedAttention("llama", 2, Silent()), torch.tensor(q, requires_grad=True)
    module.adaption_prompt.data, module.adaption_gate.data = torch.tensor(p.E), torch.tensor(p.g)
    known = peft_layer.TRANSFORMERS_MODEL_CONFIG["llama"]
    monkeypatch.setitem(peft_layer.TRANSFORMERS_MODEL_CONFIG, "llama", known._replace(compute_query_states=lambda **_: leaf))
    out = module(hidden_states=torch.zeros(1, 1, 2))[0]
    out.backward(torch.tensor(dy))
    np.testing.assert_allclose(out.detach(), [[[2.0, 0.0]]], atol=1e-6)
    np.testing.assert_allclose(leaf.grad, back.q, atol=1e-5)
    np.testing.assert_allclose(module.adaption_gate.grad, back.params.g, atol=1e-5)
    np.testing.assert_allclose(module.adaption_prompt.grad, back.params.E, atol=1e-5)
