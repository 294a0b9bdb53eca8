"""Questions about what is added to an attention block, answered by PEFT's `AdaptedAttention` and `AdaptedAttentionGPT`.

The block that PEFT wraps is a stub: it has the question's projections and returns zeros, so that PEFT's output is what it adds. The
queries are handed in: PEFT asks a function of its own for them, for which one that returns the question's stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from model import NotInPeft, array, nested
from peft import AdaptionPromptConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.adaption_prompt import layer as peft_layer
from peft.tuners.adaption_prompt.layer import AdaptedAttention, AdaptedAttentionGPT
from text import Named
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

Json = Mapping[str, Any]
METHODS = ("adaption_prompt",)


class Silent(nn.Module):
    """An attention block that attends to nothing. Its attributes are what PEFT looks for."""

    def __init__(self, asked: Json, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, heads = asked["hidden_size"], asked.get("num_attention_heads", 1)
        self.config = PretrainedConfig(hidden_size=hidden, num_attention_heads=heads)
        self.head_dim = asked.get("head_dim", hidden)
        self.split_size = hidden
        given = asked.get("projections", {"q_proj": {"weight": [[0.0] * hidden] * hidden, "bias": None}})
        for name, part in given.items():
            self.add_module(name, projection(name, part, dtype))
        if "k_proj" in given:  # of which PEFT asks the dtype
            self.q_proj = nn.Linear(hidden, heads * self.head_dim, dtype=dtype)

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


def projection(name: str, part: Json, dtype: torch.dtype) -> nn.Module:
    """One that stores (in, out) as GPT-2's, or a linear map."""
    weight = array(part["weight"], dtype)
    if name.startswith("c_"):
        layer: Any = Conv1D(weight.shape[1], weight.shape[0])
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=part["bias"] is not None)
    layer.weight.data = weight
    if name.startswith("c_") or part["bias"] is not None:
        layer.bias.data = torch.zeros(weight.shape[1], dtype=dtype) if part["bias"] is None else array(part["bias"], dtype)
    return layer


@contextmanager
def queries(kind: str, q: torch.Tensor, dtype: torch.dtype) -> Iterator[None]:
    """PEFT's function of queries replaced. It computes its softmax in float32; in float64 that name means float64."""
    before, narrow = peft_layer.TRANSFORMERS_MODEL_CONFIG[kind], torch.float32
    peft_layer.TRANSFORMERS_MODEL_CONFIG[kind] = before._replace(compute_query_states=lambda *_, **__: q)
    torch.float32 = dtype if dtype == torch.float64 else narrow
    try:
        yield
    finally:
        peft_layer.TRANSFORMERS_MODEL_CONFIG[kind], torch.float32 = before, narrow


def adapted(case: Json, dtype: torch.dtype) -> tuple[str, Any]:
    """The block under PEFT, with the case's tensors."""
    asked, own = case["attention"], case["adapters"][0]
    fused = "c_attn" in asked["projections"]
    if not fused and asked["num_attention_heads"] * asked["head_dim"] != asked["hidden_size"]:
        raise NotInPeft("PEFT takes hidden_size / (width of k_proj) for the number of heads that share a key, and raises where it is not")
    wrap = AdaptedAttentionGPT if fused else AdaptedAttention
    kind = "gpt2" if fused else "llama"
    module = wrap(model_type=kind, adapter_len=own["config"]["adapter_len"], model=Silent(asked, dtype))
    for key, value in own["tensors"].items():
        getattr(module, key).data = array(value, dtype)
    return kind, module


def output(case: Json, module: Any, kind: str, q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    hidden = torch.zeros(q.shape[0], q.shape[2], case["attention"]["hidden_size"], dtype=dtype)
    with queries(kind, q, dtype):
        return module(hidden_states=hidden)[0]


def attention(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    kind, module = adapted(case, dtype)
    with torch.no_grad():
        return {"y": nested(output(case, module, kind, array(case["q"], dtype), dtype))}


def attention_backward(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    kind, module = adapted(case, dtype)
    q = array(case["q"], dtype).requires_grad_()
    output(case, module, kind, q, dtype).backward(array(case["dy"], dtype))
    keys = case["adapters"][0]["tensors"]
    return {"q": nested(q.grad), "adapters": [{key: nested(getattr(module, key).grad) for key in keys}]}


def init(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    length, draws = case["adapters"][0]["config"]["adapter_len"], []
    for _ in range(case["draws"]):
        module = AdaptedAttention(model_type="llama", adapter_len=length, model=Silent(case["attention"], dtype))
        draws.append({key: nested(getattr(module, key)) for key in ("adaption_prompt", "adaption_gate")})
    return {"draws": draws}


def under_peft(modules: Mapping[str, int], config: Json, model_type: str, adapter: str) -> Any:
    """A model of attention blocks by name, each of a width, under a PEFT configuration."""
    own = {key: value for key, value in config.items() if key != "peft_type"}
    fused = "c_proj" if model_type == "gpt2" else "q_proj"
    blocks = []
    for name, width in modules.items():
        sized = {fused: {"weight": [[0.0] * width] * width, "bias": None}}
        blocks.append((name, Silent({"hidden_size": width, "projections": sized}, torch.float32)))
    return get_peft_model(Named(blocks, model_type), AdaptionPromptConfig(**own), adapter_name=adapter)


def config(case: Json) -> dict[str, Any]:
    """The case's blocks as stubs of two numbers; what they hold needs no module of its own."""
    blocks = {name: 2 for name in case["modules"] if name.endswith("attn")}
    try:
        model = under_peft(blocks, case["adapter_config"], case["model_config"]["model_type"], "default")
    except ValueError as refusal:
        return {"error": str(refusal)}
    found = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, AdaptedAttention | AdaptedAttentionGPT)}
    return {"modules": {name: {"adapter_len": module.adapter_len} for name, module in found.items()}}


def state_dict(case: Json) -> dict[str, Any]:
    adapter = case["adapter_name"]
    widths = {module["name"]: module["attention"]["hidden_size"] for module in case["modules"]}
    model = under_peft(widths, case["adapter_config"], "llama", adapter)
    for module in case["modules"]:
        for key, value in module["tensors"].items():
            parameter = getattr(model.get_base_model().get_submodule(module["name"]), key)
            parameter.data = array(value, parameter.dtype)
    return {"tensors": {key: nested(value) for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items()}}


OPERATIONS: Mapping[str, Callable[[Json, torch.dtype], dict[str, Any]]] = {
    "attention": attention,
    "attention_backward": attention_backward,
    "init": init,
}
TEXT_OPERATIONS: Mapping[str, Callable[[Json], dict[str, Any]]] = {"config": config, "state_dict": state_dict}
