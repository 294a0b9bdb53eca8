"""Questions about prompts, answered by PEFT's encoders, by `get_prompt` and by the `forward` of its models for tasks.

The model that PEFT wraps is a stub: word embeddings, and a `forward` that keeps what it is given. Where a question hands in a ready prompt,
a stub takes the encoder's place and returns it; PEFT gives every example the same prompt, so such a question is asked example by example.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from model import Mask, NotInPeft, array, nested
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    get_peft_model_state_dict,
)
from peft.tuners.cpt import model as of_cpt
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, EncoderDecoderCache, GenerationMixin, PretrainedConfig, PreTrainedModel

Json = Mapping[str, Any]

CONFIGS: Mapping[str, type[PeftConfig]] = {
    "cartridge": CartridgeConfig,
    "cpt": CPTConfig,
    "multitask_prompt_tuning": MultitaskPromptTuningConfig,
    "p_tuning": PromptEncoderConfig,
    "prefix_tuning": PrefixTuningConfig,
    "prompt_tuning": PromptTuningConfig,
}
VOCABULARY = 1009  # unlike any other size: PEFT finds the word embeddings by it
# The names of what a model is given, here and there.
NAMES = {
    "embeddings": "inputs_embeds",
    "attention_mask": "attention_mask",
    "labels": "labels",
    "position_ids": "position_ids",
    "token_type_ids": "token_type_ids",
    "decoder_embeddings": "decoder_inputs_embeds",
    "decoder_attention_mask": "decoder_attention_mask",
    "input_type_mask": "input_type_mask",
}
IN_CACHE = ("cartridge", "prefix_tuning")
DELTA = "delta_embedding.weight"
FLOATS = ("embeddings", "decoder_embeddings")


class Recorder(PreTrainedModel, GenerationMixin):
    """A model that keeps what it is given. Its signature and its parents have what PEFT looks for."""

    def __init__(self, config: PretrainedConfig, words: torch.Tensor) -> None:
        super().__init__(config)
        self.shared = nn.Embedding.from_pretrained(words)
        self.received: dict[str, Any] = {}

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **given: Any) -> Any:
        self.received = {"input_ids": input_ids, "past_key_values": past_key_values, **given}
        return SimpleNamespace(logits=torch.zeros(*given["inputs_embeds"].shape[:2], VOCABULARY))  # CPT works its loss out of them


class Ready(nn.Module):
    """An encoder that returns what it was told."""

    def __init__(self, prompt: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(prompt[0])  # PEFT asks it for its device
        self.prompt = prompt

    def forward(self, *indices: Any) -> torch.Tensor:
        return self.prompt


class Dropping(nn.Module):
    """torch's LSTM layer by layer, with given masks between the layers instead of its own dropout."""

    def __init__(self, lstm: nn.LSTM, masks: torch.Tensor, p: float) -> None:
        super().__init__()
        self.lstm, self.masks = lstm, [Mask(mask, p) for mask in masks]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        for layer in range(self.lstm.num_layers):
            single = nn.LSTM(x.shape[-1], self.lstm.hidden_size, bidirectional=True, batch_first=True)
            names = [name for name, _ in single.named_parameters()]
            own = {name: getattr(self.lstm, name.replace("_l0", f"_l{layer}")) for name in names}
            x = torch.func.functional_call(single, own, (x,))[0]
            x = self.masks[layer](x) if layer < len(self.masks) else x
        return x, None


def prompt(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    with torch.no_grad():
        name, value = made(case, with_tensors(case, dtype), dtype)
        return {name: nested(value)}


def prompt_backward(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    model = with_tensors(case, dtype)
    encoder, own = model.prompt_encoder["default"], case["adapters"][0]
    saved = own["config"]["inference_mode"]
    if saved or case["method"] != "cartridge":  # in inference mode PEFT freezes the table, whose gradient is asked nevertheless
        encoder.requires_grad_(True)
    made(case, model, dtype)[1].backward(array(case["dy"], dtype))
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in encoder.named_parameters()}
    if saved and case["method"] == "cartridge":
        found = {"embedding.weight": torch.cat(list(found.values()))}
    elif case["method"] == "cpt":  # a saved one still has something to add, which is zero and is not used
        found = {name: value for name, value in found.items() if name in own["tensors"]}
    return {"adapters": [{name.replace("lstm_head.lstm.", "lstm_head."): nested(value) for name, value in found.items()}]}


def made(case: Json, model: Any, dtype: torch.dtype) -> tuple[str, torch.Tensor]:
    """The prompt under the name that the answer gives it."""
    ids = case.get("task_ids")
    value = model.get_prompt(case["batch"], None if ids is None else torch.tensor(ids))
    return ("past_key_values", cached(value)) if case["method"] in IN_CACHE else ("prompt", value)


def cached(cache: Any) -> torch.Tensor:
    """Keys and values as one tensor: (layers, 2, batch, heads, n, head_dim)."""
    layers = (cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache).layers
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in layers])


def saved(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    return {"tensors": {name: nested(value) for name, value in get_peft_model_state_dict(with_tensors(case, dtype)).items()}}


def splice(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    model = wrapped(case["adapters"][0]["config"], case["method"], dtype, task=case["task_type"])
    received = [one(case, model, dtype, i) for i in range(len(case["prompt"]))]
    found = {
        name: None if value is None else nested(torch.cat([r[name] for r in received], dim=2 if value.ndim == 6 else 0))
        for name, value in received[0].items()
    }
    return {**found, "loss_weights": loss_weights(case, model, dtype)} if case["method"] == "cpt" else found


def loss_weights(case: Json, model: Any, dtype: torch.dtype) -> Any:
    """Of every label the derivative of PEFT's loss, of the whole batch, for that label's own cross-entropy."""
    if "labels" not in case["inputs"]:
        return None
    model.prompt_encoder["default"] = Ready(array(case["prompt"][:1], dtype))
    given = inputs(case, slice(None), dtype)
    batch, tokens = given["labels"].shape
    each = torch.zeros(batch * (len(case["prompt"][0]) + tokens - 1), dtype=dtype, requires_grad=True)
    real = of_cpt.CrossEntropyLoss
    try:
        of_cpt.CrossEntropyLoss = lambda **_: lambda logits, labels: each
        model(**given).loss.backward()
    finally:
        of_cpt.CrossEntropyLoss = real
    return nested(torch.nn.functional.pad(each.grad.view(batch, -1), (1, 0)))


def inputs(case: Json, examples: slice, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        NAMES[name]: array(value[examples], dtype) if name in FLOATS else torch.tensor(value[examples])
        for name, value in case["inputs"].items()
        if value is not None
    }


def one(case: Json, model: Any, dtype: torch.dtype, i: int) -> dict[str, torch.Tensor | None]:
    """What the model receives of example i."""
    if case["method"] == "multitask_prompt_tuning" and case["task_type"] in ("QUESTION_ANS", "FEATURE_EXTRACTION"):
        raise NotInPeft(f"PEFT's forward for {case['task_type']} does not pass task_ids on, without which this encoder raises")
    model.prompt_encoder["default"] = Ready(array(case["prompt"][i : i + 1], dtype))
    model(**inputs(case, slice(i, i + 1), dtype), task_ids=torch.zeros(1, dtype=torch.long))
    received = model.base_model.received
    cache = received["past_key_values"]
    found = {name: received.get(theirs) for name, theirs in NAMES.items() if name != "input_type_mask"}  # no model receives it
    return {**found, "past_key_values": None if cache is None else cached(cache)}


def init(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    config, words = dict(case["adapters"][0]["config"]), case.get("words")
    with started_from(case, config):
        return {"draws": [fresh(config, case["method"], dtype, words) for _ in range(case["draws"])]}


def fresh(config: Json, method: str, dtype: torch.dtype, words: Any) -> dict[str, Any]:
    encoder = wrapped(config, method, dtype, words=None if words is None else array(words, dtype)).prompt_encoder["default"]
    return {name: nested(value) for name, value in encoder.state_dict().items()}


@contextmanager
def started_from(case: Json, config: dict[str, Any]) -> Iterator[None]:
    """PEFT reads a source from a file and tokenizes a text with a tokenizer of a name: here is the file, and the tokenizer."""
    read = transformers.AutoTokenizer.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        if "source" in case:
            file = Path(folder) / "source.safetensors"
            save_file({key: array(value, torch.get_default_dtype()) for key, value in case["source"].items()}, file)
            config["prompt_tuning_init_state_dict_path"] = str(file)
        try:
            transformers.AutoTokenizer.from_pretrained = lambda *_, **__: lambda text: {"input_ids": list(case["token_ids"])}
            yield
        finally:
            transformers.AutoTokenizer.from_pretrained = read


def config(case: Json) -> dict[str, Any]:
    """The sizes that PEFT's configuration has once it met the model, and those of the table that it would save."""
    model_config = {k: v for k, v in case["model_config"].items() if k != "model_type"}
    about = AutoConfig.for_model(case["model_config"]["model_type"], **model_config)
    text = about.get_text_config()
    given = {k: v for k, v in case["adapter_config"].items() if k != "task_type"}
    words = torch.zeros(text.vocab_size, text.hidden_size)
    model = wrapped(given, case["method"], torch.float32, words=words, task=case["adapter_config"]["task_type"], about=about)
    rows, columns = get_peft_model_state_dict(model)["prompt_embeddings"].shape
    config = model.active_peft_config
    names = ["token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules"]
    names += ["encoder_hidden_size"] if case["method"] in ("p_tuning", "prefix_tuning") else []
    return {"sizes": {"rows": rows, "columns": columns, **{name: getattr(config, name) for name in names}}}


def state_dict(case: Json) -> dict[str, Any]:
    name = case["adapter_name"]
    model = wrapped(case["adapter_config"], case["method"], torch.float32, adapter=name)
    load(model.prompt_encoder[name], case["tensors"], torch.float32)
    return {"tensors": {key: nested(value) for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}}


OPERATIONS: Mapping[str, Callable[[Json, torch.dtype], dict[str, Any]]] = {
    "prompt": prompt,
    "prompt_backward": prompt_backward,
    "saved": saved,
    "splice": splice,
    "init": init,
}
TEXT_OPERATIONS: Mapping[str, Callable[[Json], dict[str, Any]]] = {"config": config, "state_dict": state_dict}


def with_tensors(case: Json, dtype: torch.dtype) -> Any:
    """A model whose encoder has the case's tensors, and its masks."""
    own = case["adapters"][0]
    model = wrapped(own["config"], case["method"], dtype)
    encoder = model.prompt_encoder["default"]
    load(encoder, own["tensors"], dtype)
    if "dropout" in case:
        encoder.lstm_head = Dropping(encoder.lstm_head, array(case["dropout"], dtype), own["config"]["encoder_dropout"])
    model.eval()
    return model


def load(encoder: Any, tensors: Json, dtype: torch.dtype) -> None:
    given = {name: array(value, dtype) for name, value in tensors.items()}
    encoder.to(dtype)
    if list(given) == ["embedding.weight"] and not isinstance(encoder.embedding, nn.Embedding):  # a saved cartridge
        encoder.load_prompt_embeddings(given["embedding.weight"])
        return
    held = encoder.state_dict()
    encoder.load_state_dict({**given, **{name: torch.zeros_like(held[name]) for name in held if name == DELTA and name not in given}})


def wrapped(
    given: Json,
    method: str,
    dtype: torch.dtype,
    *,
    task: str | None = None,
    adapter: str = "default",
    words: torch.Tensor | None = None,
    about: PretrainedConfig | None = None,
) -> Any:
    """PEFT's model for a task, or for none, around a recorder."""
    fields = {k: v for k, v in given.items() if k != "peft_type"}
    if (encoder := "encoder_reparameterization_type") in fields:  # PEFT's warning about the number of layers crashes on a plain text
        fields[encoder] = PromptEncoderReparameterizationType(fields[encoder])
    task = "CAUSAL_LM" if method == "cpt" else task
    own: Any = CONFIGS[method](task_type=task, **fields)
    words = torch.zeros(VOCABULARY, given.get("token_dim") or 1, dtype=dtype) if words is None else words
    # The sizes of CPT are the model's, whatever its configuration says.
    sizes = {"num_layers": "num_hidden_layers", "token_dim": "hidden_size", "num_attention_heads": "num_attention_heads"}
    about = about or PretrainedConfig(
        vocab_size=len(words), **({theirs: given[name] for name, theirs in sizes.items()} if method == "cpt" else {})
    )
    base = Recorder(about, words)
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task](base, own, adapter) if task else PeftModel(base, own, adapter)
