"""Prefix tuning and P-tuning equal HF PEFT's in float64: what real models receive, every gradient, files and what is loaded from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft_ref.check.corpus import corpus  # noqa: E402
from peft_ref.check.diagnose import expected_answer  # noqa: E402
from peft_ref.check.tolerance import compare  # noqa: E402
from peft_ref.methods import PrefixTuning, PTuning  # noqa: E402
from peft_ref.prompts import EMBEDDING, SAVED, Context, Prompt  # noqa: E402
from peft_ref.splice import key_values, key_values_vjp  # noqa: E402
from tests.spec.pages import METHOD_PAGES, run  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]
TOLERANCE = 1e-12  # relative to the largest number of the array
BATCH = 3

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-grouped": ("Llama", LLAMA),
    "llama-head-dim": ("Llama", {**LLAMA, "head_dim": 6, "num_key_value_heads": 1}),
    "gpt2": ("GPT2", {"n_embd": 12, "n_layer": 3, "n_head": 3, "n_positions": 32}),
    "t5-even": ("T5", {"d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 4, "num_heads": 3, "decoder_start_token_id": 0}),
    "t5-odd": ("T5", {"d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 3, "num_heads": 3, "decoder_start_token_id": 0}),
    "bert": ("Bert", {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}),
}
CLASSES = {
    "Llama": ("LlamaForCausalLM", "CAUSAL_LM"),
    "GPT2": ("GPT2LMHeadModel", "CAUSAL_LM"),
    "T5": ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    "Bert": ("BertModel", "FEATURE_EXTRACTION"),
}
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5}
SETTINGS: dict[str, Prompt] = {
    "prefix": PrefixTuning(num_virtual_tokens=4),
    "prefix-projected": PrefixTuning(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=7),
    "prefix-projected-default": PrefixTuning(num_virtual_tokens=2, prefix_projection=True),
    "mlp": PTuning(num_virtual_tokens=4, encoder_hidden_size=7),
    "mlp-default": PTuning(num_virtual_tokens=2),
    **{f"lstm-{n}": PTuning(num_virtual_tokens=4, encoder_num_layers=n, **LSTM) for n in (1, 2, 3)},  # type: ignore[arg-type]
}
CONFIGS = {"PREFIX_TUNING": "PrefixTuningConfig", "P_TUNING": "PromptEncoderConfig"}


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.manual_seed(11)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def base(name: str) -> tuple[Any, str]:
    """A tiny model with random weights, and its task."""
    family, sizes = MODELS[name]
    cls, task = CLASSES[family]
    config = getattr(transformers, f"{family}Config")(vocab_size=17, pad_token_id=0, **sizes)
    return getattr(transformers, cls)(config).eval(), task


def config_of(method: Prompt, task: str, **more: Any) -> Any:
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return getattr(peft, CONFIGS[method.peft_type])(task_type=task, **{**fields, **more})


def made(setting: str, name: str, **more: Any) -> tuple[Any, Prompt, dict[str, Any]]:
    """PEFT's model, the method with the sizes that we find, and PEFT's tensors as arrays."""
    method = dataclasses.replace(SETTINGS[setting], **more)
    model, task = base(name)
    tuned = peft.get_peft_model(model, config_of(method, task)).eval()
    ours = method.sized(model.config.to_dict(), task)
    return tuned, ours, tensors_of(tuned)


def tensors_of(model: Any) -> dict[str, Any]:
    return {k: v.detach().numpy().copy() for k, v in model.prompt_encoder["default"].named_parameters()}


def cache_of(cache: Any, layers: int) -> Any:
    """What PEFT hands to the model, as (layers, 2, batch, heads, n, head_dim)."""
    layers_of = getattr(cache, "self_attention_cache", cache).layers
    assert len(layers_of) == layers
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in layers_of])


def close(got: Any, want: Any) -> None:
    got, want = np.asarray(got), np.asarray(want.detach() if torch.is_tensor(want) else want)
    assert got.shape == want.shape
    assert np.max(np.abs(got - want), initial=0.0) <= TOLERANCE * max(np.max(np.abs(want), initial=0.0), 1.0)


def theirs(model: Any, method: Prompt) -> Any:
    prompt = model.get_prompt(BATCH)
    return cache_of(prompt, method.size("num_layers")) if method.place == "cache" else prompt


def check_prompt_and_gradients(model: Any, method: Prompt, p: dict[str, Any], ctx: Context) -> None:
    got, want = method.prompt(method.check(p), ctx), theirs(model, method)
    close(key_values(method, got) if method.place == "cache" else got, want)
    dy = np.random.default_rng(3).normal(size=want.shape)
    want.backward(torch.tensor(dy))
    d = key_values_vjp(method, got, dy) if method.place == "cache" else dy
    grads = method.prompt_vjp(p, ctx, d)
    parameters = dict(model.prompt_encoder["default"].named_parameters())
    assert grads.keys() == parameters.keys()
    for key, parameter in parameters.items():
        close(grads[key], parameter.grad)
        assert torch.any(parameter.grad != 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_model_receives_and_every_gradient_equal_pefts(setting: str, name: str) -> None:
    check_prompt_and_gradients(*made(setting, name), Context(batch=BATCH))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_sizes_are_those_that_peft_finds(setting: str, name: str) -> None:
    model, ours, _ = made(setting, name)
    found = model.peft_config["default"]
    for field in dataclasses.fields(ours):
        assert getattr(found, field.name) == getattr(ours, field.name), field.name


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_loss_through_a_whole_model_reaches_every_tensor_as_pefts_does(setting: str) -> None:
    """The gradient of the cache or the prompt comes from the model; what we make of it is what autograd makes of it."""
    for name in ("llama-grouped", "t5-even"):
        model, ours, p = made(setting, name)
        held: list[Any] = []
        encoder = model.prompt_encoder["default"]
        encoder.register_forward_hook(lambda module, args, out, held=held: (out.retain_grad(), held.append(out))[0])
        x = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
        y = {"labels": x} if name == "llama-grouped" else {"labels": torch.tensor([[1, 2, 3], [4, 5, 6]])}
        model(input_ids=x, attention_mask=torch.ones_like(x), **y).loss.backward()
        d = held[0].grad.sum(dim=0).numpy()
        grads = ours.table_vjp(p, Context(batch=1), d)  # type: ignore[attr-defined]  # both are tables
        for key, parameter in encoder.named_parameters():
            close(grads[key], parameter.grad)


class Masks(torch.nn.Module):
    """An LSTM whose dropout between layers has given masks: its layers one after the other, each as torch computes it."""

    def __init__(self, whole: Any, factors: list[Any]) -> None:
        super().__init__()
        self.factors = factors
        hidden, sizes = whole.hidden_size, [whole.input_size] + [2 * whole.hidden_size] * (whole.num_layers - 1)
        self.layers = torch.nn.ModuleList(torch.nn.LSTM(n, hidden, bidirectional=True, batch_first=True) for n in sizes)
        for k, layer in enumerate(self.layers):
            for name, _ in list(layer.named_parameters()):
                setattr(layer, name, getattr(whole, name.replace("_l0", f"_l{k}")))  # the same Parameter

    def forward(self, x: Any) -> Any:
        for k, layer in enumerate(self.layers):
            x = layer(x)[0]
            x = x * self.factors[k] if k < len(self.factors) else x
        return x, None


@pytest.mark.parametrize("layers", [2, 3])
def test_dropout_between_the_layers_with_given_masks_equals_pefts(layers: int) -> None:
    model, ours, p = made(f"lstm-{layers}", "llama-grouped", encoder_dropout=0.75)
    model.train()
    rng = np.random.default_rng(layers)
    masks = tuple(rng.integers(0, 2, (4, 10)) for _ in range(layers - 1))
    encoder = model.prompt_encoder["default"]
    whole = encoder.lstm_head
    encoder.lstm_head = Masks(whole, [torch.tensor(m / 0.25) for m in masks])
    dy = rng.normal(size=(BATCH, 4, 16))
    out = model.get_prompt(BATCH)
    out.backward(torch.tensor(dy))
    ctx = Context(batch=BATCH, dropout=masks)
    close(ours.prompt(p, ctx), out)
    grads = ours.prompt_vjp(p, ctx, dy)
    for name, parameter in whole.named_parameters():
        close(grads[f"lstm_head.{name}"], parameter.grad)
    close(grads[EMBEDDING], encoder.embedding.weight.grad)


def test_dropout_lies_between_the_layers_and_is_rescaled_in_torch() -> None:
    """At probability one half and with torch's own draw: what it keeps is twice as large, and the last layer's output is not dropped."""
    whole = torch.nn.LSTM(3, 2, num_layers=2, dropout=0.5, bidirectional=True, batch_first=True)
    x = torch.randn(1, 4, 3)
    first = Masks(whole, []).layers[0](x)[0]
    whole.train()
    torch.manual_seed(5)
    got = whole(x)[0].detach()
    torch.manual_seed(5)
    factors = torch.nn.functional.dropout(torch.ones_like(first), 0.5)
    assert set(factors.unique().tolist()) == {0.0, 2.0}
    close(Masks(whole, [factors])(x)[0].detach(), got)


@pytest.mark.parametrize("name", ["llama-grouped", "t5-even"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_file_holds_what_pefts_holds_and_is_loaded_as_peft_loads_it(setting: str, name: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model, ours, p = made(setting, name)
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    saved = ours.saved(p)
    assert saved.keys() == file.keys() == {SAVED}
    close(saved[SAVED], file[SAVED])
    # What we save PEFT loads, and uses as we use what it saved.
    save_file({k: np.ascontiguousarray(v) for k, v in saved.items()}, tmp_path / "adapter_model.safetensors")
    loaded = peft.PeftModel.from_pretrained(base(name)[0], tmp_path)
    used, q = ours.in_inference(), ours.loaded(file)
    assert tensors_of(loaded).keys() == q.keys()
    check_prompt_and_gradients(loaded, used, q, Context(batch=BATCH))
    close(used.saved(q)[SAVED], file[SAVED])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_torchs_lstm_stays_within_the_tolerance_of_every_case(dtype: str) -> None:
    """An honest LSTM of other hands: the judge's bounds hold for it, and they are no more than some thousand roundings wide."""
    seen = 0
    for case in corpus("p_tuning"):
        if case.operation not in ("prompt", "prompt_backward"):
            continue
        config = case.adapters[0].config
        if config["encoder_reparameterization_type"] != "LSTM" or config["inference_mode"]:
            continue
        made_of = {k: v for k, v in config.items() if k != "peft_type"}
        encoder = peft.PromptEncoder(peft.PromptEncoderConfig(**made_of)).to(getattr(torch, dtype))
        encoder.load_state_dict({k: torch.tensor(v) for k, v in case.adapters[0].tensors.items()})
        whole = encoder.lstm_head
        factors = [torch.tensor(m / (1 - config["encoder_dropout"])).to(encoder.embedding.weight) for m in case.question.get("dropout", [])]
        encoder.lstm_head = Masks(whole, factors)
        rows = torch.arange(config["num_virtual_tokens"] * config["num_transformer_submodules"])
        out = encoder(rows[None]).repeat(case.question["batch"], 1, 1)
        got = {"prompt": out.detach().numpy()}
        if case.operation == "prompt_backward":
            out.backward(torch.tensor(case.dy).to(out))
            encoder.lstm_head = whole
            got = {f"0.{k}": v.grad.numpy() for k, v in encoder.named_parameters()}
        expected = expected_answer(case, dtype)
        assert compare(got, expected).ratio <= 1, case.id
        for key, tolerance in expected.tolerance.items():
            unit = 2.0 ** -{"float32": 24, "float64": 53}[dtype]
            assert np.max(tolerance) <= 1e5 * unit * max(1.0, np.max(np.abs(expected.values[key]))), (case.id, key)
        seen += 1
    assert seen >= 8


def worked() -> list[Any]:
    """Every gradient worked out by hand on the two pages, with the page's own values at that place."""
    found = []
    for name in ("p_tuning", "prefix_tuning"):
        for ran in run(METHOD_PAGES[name]):
            if "grads =" in ran.block.source:
                found.append(pytest.param(ran.names, id=f"{name}-line{ran.block.line}"))
    return found


@pytest.mark.parametrize("names", worked())
def test_the_numbers_of_the_pages_are_those_of_hf(names: dict[str, Any]) -> None:
    method, p, ctx, dy = (names[k] for k in ("method", "p", "ctx", "dy"))
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    encoder = (peft.PrefixEncoder if method.place == "cache" else peft.PromptEncoder)(getattr(peft, CONFIGS[method.peft_type])(**fields))
    encoder.load_state_dict({k: torch.tensor(v) for k, v in p.items()})
    out = encoder(torch.arange(method.table_shape[0])[None])
    close(method.prompt(p, ctx), out)
    out.backward(torch.tensor(dy))
    for key, parameter in encoder.named_parameters():
        close(names["grads"][key], parameter.grad)


@pytest.mark.parametrize("cls", [PrefixTuning, PTuning])
def test_without_a_size_peft_and_we_refuse(cls: Any) -> None:
    from peft_ref.errors import ConfigError

    with pytest.raises(ConfigError, match="token_dim"):
        cls(num_virtual_tokens=2).sized({})
    config = config_of(cls(num_virtual_tokens=2), "CAUSAL_LM")
    with pytest.raises(ValueError, match="num_layers"):
        peft.utils.other._prepare_prompt_learning_config(config, {})
