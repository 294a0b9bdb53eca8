"""A case's layer as a torch module with PEFT's adapters on it.

The layer is the only module of a model, under the name "layer". Tensors go in and gradients come out through PEFT's own state dict
functions, so the checkpoint keys of a case are tested too. A dropout mask replaces PEFT's dropout module by one that multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from told import DROPOUTS
from torch import nn
from transformers.pytorch_utils import Conv1D

Json = Mapping[str, Any]

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONVOLUTIONS = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
INVERTED = ("oft", "road")
PREFIX, WIDE = "base_model.model.layer.", "base_model.model.wide."
FLOAT32 = ("c3a", "fourierft")
NARROW = ("deft",)  # computed in float32 whatever came
SHARED = ("vera_A", "vera_B", "pvera_A", "pvera_B", "randlora_A", "randlora_B", "vblora_vector_bank", "unilora_theta_d")
GROUPED = {"tinylora_v": "0", "frod_V": "layer", "frod_s_indices": "layer", "frod_s_size": "layer"}  # shared under a name of their own
TAKEN_OVER = ("vera", "pvera", "randlora", "frod")
SEEDED = (*TAKEN_OVER, "unilora", "tinylora")  # what a seed decides depends on torch's default dtype, and PEFT's users have float32


class NotInPeft(Exception):
    """PEFT cannot do what is asked; the message says why."""


class Mask(nn.Module):
    """Dropout with a given mask. DoRA asks for an `Identity` or for training mode, so this is neither, and the model trains."""

    def __init__(self, mask: torch.Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.functional.pad(self.mask, (0, x.shape[-1] - self.mask.shape[-1]))  # MiSS drops out of an input it has padded
        return x * mask / (1 - self.p)


class Model(nn.Module):
    def __init__(self, layer: nn.Module, wide: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        if wide is not None:
            self.wide = wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Adapted(NamedTuple):
    model: Any
    layer: Any


def adapted(case: Json, dtype: torch.dtype) -> Adapted:
    """The layer with the case's adapters, all of them active."""
    check(case, dtype)
    adapters = case.get("adapters", ())
    if not adapters:
        base = build(case["layer"], dtype)
        return Adapted(base, base)
    model = made(case, dtype)
    layer = model.base_model.model.layer
    for name, adapter in zip(names(case), adapters, strict=True):
        for key in hidden(adapter["tensors"]):
            getattr(layer, key)[name] = array(adapter["tensors"][key], dtype)
        tensors = {place(key): array(value, dtype) for key, value in adapter["tensors"].items() if key not in hidden(adapter["tensors"])}
        result = set_peft_model_state_dict(model, tensors, adapter_name=name)
        if result.unexpected_keys:
            raise KeyError(f"PEFT does not expect {result.unexpected_keys}")
        if of := adapter["config"].get("clusters"):  # it made its own from the weight, and loading leaves them
            layer.scatter_index[name] = torch.tensor(sorted(range(len(of)), key=lambda row, of=of: (of[row], row)))
    model.eval()
    if case["method"] == "kasa":  # whose start cuts the weight: the case's is what is left
        layer.get_base_layer().weight.data = array(case["layer"]["weight"], dtype)
    model.train(case["method"] == "velora")  # which compresses in training alone
    if any(adapter["dropout"] for adapter in adapters):
        model.train()
        for name, adapter in zip(names(case), adapters, strict=True):
            drop = adapter["dropout"]
            modules = getattr(layer, DROPOUTS.get(adapter["config"]["peft_type"], "lora_dropout"))
            modules[name] = Mask(array(drop["mask"], dtype), drop["p"]) if drop else nn.Identity()
            if case["method"] == "pvera":  # in training it samples: here the mean
                layer._reparametrize = lambda mean, log_variance, name: mean
            if case["method"] == "monteclora":  # in training it draws: nothing, here
                for drawn in layer.lora_monteclora_sampler[name].sampler.buffer:
                    drawn["z_mvn"].zero_()
    return Adapted(model, layer)


@contextmanager
def float32_meaning(dtype: torch.dtype, method: str) -> Iterator[None]:
    """What PEFT works out in float32, in float64 if that is asked for."""
    narrow = torch.float32
    torch.float32 = dtype if method in NARROW and dtype == torch.float64 else narrow
    try:
        yield
    finally:
        torch.float32 = narrow


def fresh(case: Json, dtype: torch.dtype) -> dict[str, Any]:
    """One freshly drawn adapter, and the frozen weight where drawing changed it."""
    check(case, dtype)
    init = case["adapters"][0]["config"].get("init_lora_weights")
    if init in ("pissa", "olora") and dtype == torch.float64:
        raise NotInPeft(f"PEFT refuses init_lora_weights={init!r} on float64 and works it out in float32: ask with --dtype float32")
    model = made(case, dtype)
    layer, name = model.base_model.model.layer, names(case)[0]
    draw = {key: nested(value) for key, value in own_tensors(model, name).items()}
    draw |= {key: nested(getattr(layer, key)[name]) for key in hidden(layer.other_param_names) if name in getattr(layer, key)}
    weight = layer.get_base_layer().weight
    changed = not torch.equal(weight, array(case["layer"]["weight"], dtype))
    return {**draw, "weight": nested(weight)} if changed else draw


def made(case: Json, dtype: torch.dtype) -> Any:
    """The model with fresh adapters. PSOFT refuses to make them on a float64 weight, and computes in float64 once they are there."""
    first = torch.float32 if case["method"] == "psoft" and dtype == torch.float64 else dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if case["method"] in SEEDED else before)
    try:
        return inject(build(case["layer"], first), case["layer"], case["adapters"]).to(dtype)
    finally:
        torch.set_default_dtype(before)


def hidden(keys: Iterable[str]) -> list[str]:
    """What a layer keeps beside the weight and saves in no file."""
    return [key for key in keys if key.startswith("_") or key == "frod_U"]


def check(case: Json, dtype: torch.dtype) -> None:
    """Raise `NotInPeft` for what is known to go wrong there."""
    if case["method"] in INVERTED and case["operation"] == "unmerge" and dtype == torch.float64:
        raise NotInPeft("PEFT inverts the matrix of an unmerged adapter in float32: ask with --dtype float32")
    if case["method"] == "adamss" and case["operation"] == "init":
        raise NotInPeft("PEFT clusters the rows of the weight by k-means, whatever clusters a case has")
    if case["method"] == "adamss" and case["operation"] in ("forward", "backward") and np.ndim(case["x"]) == 1:
        raise NotInPeft("PEFT's forward wants x to have a leading axis, and raises")
    if case["method"] == "mica" and dtype == torch.float64:
        raise NotInPeft("PEFT refuses MiCA on float64: ask with --dtype float32")
    if case["method"] == "monteclora" and any(adapter["dropout"] for adapter in case["adapters"]):
        raise NotInPeft("PEFT drops in training mode alone, where it also draws samples")
    if case["method"] == "qalora":
        raise NotInPeft("PEFT makes QA-LoRA on GPTQ's layers alone")
    if case["method"] in TAKEN_OVER and len(case["adapters"]) > 1:
        raise NotInPeft("PEFT gives a later adapter the first one's random matrices, whatever its own are")
    if any(adapter["config"].get("boft_n_butterfly_factor", 1) > 1 for adapter in case.get("adapters", ())):
        raise NotInPeft("PEFT takes one factor where its CUDA kernel is not built, whatever boft_n_butterfly_factor says")
    if case["method"] in FLOAT32 and dtype == torch.float64 and case["operation"] != "init":
        raise NotInPeft("PEFT computes this method in float32, whatever the layer's dtype: ask with --dtype float32")
    square = case["layer"].get("in_features") == case["layer"].get("out_features")
    if case["method"] == "c3a" and len(case["adapters"]) > 1 and not square and case["operation"] in ("forward", "backward"):
        raise NotInPeft("PEFT feeds every C3A adapter to the next one and crashes where in and out differ")
    layer, lora = case["layer"], case["method"] in ("lora", "dora")
    if lora and case["operation"] in ("forward", "backward") and any(d > 1 for d in layer.get("dilation", ())):
        raise NotInPeft("PEFT does not pass a convolution's dilation on to lora_A and crashes in forward")


def inject(base: nn.Module, layer: Json, adapters: Any) -> Any:
    model: Any = None
    for i, adapter in enumerate(adapters):
        config = config_of(adapter["config"], layer, later=i > 0)
        if model is None:
            model = get_peft_model(Model(base, wide(adapter["config"], base)), config, adapter_name="a0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
        if (live := adapter["config"].get("live_r")) is not None:
            kept = [k < live for k in range(config.init_r)]
            model.base_model.resize_modules_by_rank_pattern({f"layer.lora_E.a{i}": kept}, f"a{i}")
    model.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    return model


def wide(config: Json, base: nn.Module) -> nn.Module | None:
    """Another adapted layer, as wide as the case's adapter says that the widest is."""
    if config.get("widest_in") is None:
        return None
    return nn.Linear(config["widest_in"], config["widest_out"]).to(base.weight.dtype)


def place(key: str) -> str:
    """The key in a file: what layers share stands there once."""
    if key in GROUPED:
        return f"base_model.{key}.{GROUPED[key]}"
    return f"base_model.{key}" if key in SHARED else PREFIX + key


def key_of(place: str) -> str:
    """Undoes `place`."""
    key = place.removeprefix(PREFIX).removeprefix("base_model.")
    name, _, group = key.rpartition(".")
    return name if GROUPED.get(name) == group else key


def config_of(config: Json, layer: Json, later: bool = False) -> PeftConfig:
    """PEFT's configuration; `is_feedforward` is what its `feedforward_modules` say, `live_r` what its `rank_pattern` leaves."""
    own = {
        k: v
        for k, v in config.items()
        if k not in ("peft_type", "is_feedforward", "live_r", "widest_in", "widest_out", "clusters", "ranks", "budget", "entries")
    }
    if config["peft_type"] == "FROD":
        own["progressbar"] = False
    if config["peft_type"] == "ADALORA" and later:
        own["inference_mode"] = True  # it trains one adapter alone
    if config["peft_type"] == "IA3":
        own["feedforward_modules"] = ["layer"] if config["is_feedforward"] else []
    if (diagonal := own.pop("diagonal", None)) is not None:
        own["use_bdlora"] = {k: own["use_bdlora"][k] for k in ("nblocks", "match_strict")}
        own["use_bdlora"] |= {f"target_modules_bd_{diagonal.lower()}": ["layer"]} if diagonal else {}
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    if "fan_in_fan_out" in cls.__dataclass_fields__:
        own["fan_in_fan_out"] = layer["kind"] == "transposed_linear"
    return cls(target_modules=["layer", "wide"], **own)


def build(layer: Json, dtype: torch.dtype) -> nn.Module:
    """The frozen layer. A `Conv1D` always has a bias: where the case has none it is zero."""
    kind, bias = layer["kind"], layer["bias"]
    module: nn.Module
    if kind == "linear":
        module = nn.Linear(layer["in_features"], layer["out_features"], bias=bias is not None)
    elif kind == "transposed_linear":
        module = Conv1D(layer["out_features"], layer["in_features"])
    elif kind == "embedding":
        module = nn.Embedding(layer["num_embeddings"], layer["embedding_dim"])
    elif kind == "norm":
        module = norm(layer, bias is not None)
    else:
        geometry = {key: tuple(layer[key]) for key in ("kernel_size", "stride", "padding", "dilation")}
        channels = layer["in_channels"], layer["out_channels"]
        module = CONVOLUTIONS[kind](*channels, **geometry, groups=layer["groups"], bias=bias is not None)
    module.weight = nn.Parameter(array(layer["weight"], dtype))
    if bias is not None:
        module.bias = nn.Parameter(array(bias, dtype))
    return module.to(dtype)


def norm(layer: Json, bias: bool) -> nn.Module:
    """torch's RMS norm has no bias."""
    if layer["centred"]:
        return nn.LayerNorm(layer["features"], eps=layer["eps"], bias=bias)
    if bias:
        raise NotInPeft("torch has no RMS norm with a bias")
    return nn.RMSNorm(layer["features"], eps=layer["eps"])


def names(case: Json) -> list[str]:
    return [f"a{i}" for i in range(len(case["adapters"]))]


def gradients(model: Any, case: Json) -> list[dict[str, Any]]:
    """Every adapter's gradients under its checkpoint keys, picked out by PEFT's own function for state dicts."""
    every_name = model.named_parameters(remove_duplicate=False)  # what layers share has one in each of them
    parameters = [(name, p) for name, p in every_name if p.requires_grad or case["method"] != "mica"]  # whose B is frozen
    trained = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters}
    held = {name: torch.zeros(value.shape, dtype=torch.int64) for name, value in model.state_dict().items()}  # has no gradient
    every = [own_tensors(model, name, {**held, **trained}) for name in names(case)]
    return [{key: nested(value) for key, value in own.items() if value.is_floating_point()} for own in every]


def own_tensors(model: Any, adapter: str, state_dict: Any = None) -> dict[str, torch.Tensor]:
    tensors = get_peft_model_state_dict(model, state_dict, adapter_name=adapter, save_embedding_layers=False)
    own = {key: value for key, value in tensors.items() if not key.startswith(WIDE)}
    return {key_of(key): value for key, value in own.items()}


def array(value: Any, dtype: torch.dtype) -> torch.Tensor:
    """Nested lists as a tensor."""
    return torch.from_numpy(np.asarray(value, dtype=np.float64)).to(dtype)


def nested(tensor: torch.Tensor) -> Any:
    """A tensor as nested lists, numbers that are not finite as strings."""
    values = tensor.detach().double()
    if bool(torch.isfinite(values).all()):
        return values.tolist()
    return name_nonfinite(values.tolist())


def name_nonfinite(value: Any) -> Any:
    if isinstance(value, list):
        return [name_nonfinite(v) for v in value]
    return value if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
