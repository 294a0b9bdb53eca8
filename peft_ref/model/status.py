"""What a model with adapters holds: counts, HF's printed line, and its layer and model status.

A parameter counts once, a copy of modules_to_save beside its original, and AdaLoRA's `ranknum`: one number a module, which no file has.
An adapter on attention blocks counts while it acts, and then as trained, even where it was loaded or is for inference: so does HF's.

HF      PeftModel.get_nb_trainable_parameters, print_trainable_parameters, get_layer_status, get_model_status. State is held once here, so
        nothing is ever "irregular" but active_adapters and merged_adapters of a model whose adapters are on different modules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from peft_ref.arrays import Array
from peft_ref.arrays import device as device_of
from peft_ref.contracts import ParamSpec, WeightMethod
from peft_ref.errors import ConfigError
from peft_ref.files.rules import field_names
from peft_ref.files.tokens import WRAPPER
from peft_ref.model.adapted import Adapted, Attached
from peft_ref.model.lazy import LazyModules

# HF's names, where they are not the type's own: of the model class, and of a layer class by the kind of layer.
MODEL_CLASSES = {"LORA": "LoraModel", "ADALORA": "AdaLoraModel", "IA3": "IA3Model", "LOHA": "LoHaModel", "LOKR": "LoKrModel"}
MODEL_CLASSES |= {"LN_TUNING": "LNTuningModel"}
LAYER_CLASSES = {"linear": "Linear", "transposed_linear": "Linear", "embedding": "Embedding"}
PREFIX = "model."  # of module names under HF's tuner
COPIES = "ModulesToSaveWrapper"
TOKENS = "TrainableTokensLayer"  # within a wrapper
IRREGULAR: Literal["irregular"] = "irregular"


class Count(NamedTuple):
    trainable: int
    total: int

    def __str__(self) -> str:
        """The line that HF prints."""
        share = 100 * self.trainable / self.total if self.total else 0.0
        return f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || trainable%: {share:.4f}"


class LayerStatus(NamedTuple):
    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: None = None


class ModelStatus(NamedTuple):
    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: None = None


def count(model: Adapted) -> Count:
    """How many parameters are trained, and how many there are."""
    known = model.base.parameters()
    total = sum(math.prod(p.shape) for p in known.values())
    trainable = sum(math.prod(known[name].shape) for name in model.trainable_biases)
    acting = sum(math.prod(s.shape) for name, a in model.attention().items() for s in a.method.spec(_width(model, name)))
    trainable, total = trainable + acting, total + acting
    for adapter in model.adapters.values():
        own = _numbers(model, adapter)
        own += sum(math.prod(copy.shape) for key, copy in adapter.saved.items() if key in known or key in model.base.tied())
        adapted = len(adapter.modules) - len(adapter.config.beside)
        total += own + _held(model, adapter) + (adapted if "live_r" in field_names(type(adapter.config.method)) else 0)
        trainable += own if adapter.trainable else 0
    return Count(trainable, total)


def layer_status(model: Adapted) -> list[LayerStatus]:
    """Every adapted module, and every one of modules_to_save, in the model's order."""
    model.refuse_attention("layer_status")
    found = []
    for module in (*model.modules(), *model.aliases()):
        here = {name: adapter for name, adapter in model.adapters.items() if module in adapter.modules}
        if beside := [name for name, adapter in here.items() if module in adapter.config.beside]:
            tokens = _status(model, module, beside, TOKENS, [name for name in model.active_names if name in beside])
            found.append(tokens._replace(name=f"{tokens.name}.{WRAPPER}"))
        on = {name: adapter for name, adapter in here.items() if name not in beside}
        for kind in dict.fromkeys(adapter.config.method.peft_type for adapter in on.values()):
            names = [name for name, adapter in on.items() if adapter.config.method.peft_type == kind]
            found.append(_status(model, module, names, _layer_class(kind, model.layer(module).kind), list(model.active_names)))
        whole = [name for name, adapter in model.adapters.items() if module in adapter.whole]
        if whole:
            found.append(_status(model, module, whole, COPIES, [name for name in model.active_names if name in whole]))
    if not found:
        raise ConfigError("there is no adapter on this model (HF PEFT refuses it too).\n  Add one.")
    return found


def model_status(model: Adapted) -> ModelStatus:
    """The layers' status as one."""
    layers, counted = layer_status(model), count(model)
    types = {name: adapter.config.method.peft_type for name, adapter in model.adapters.items()}
    actives = {tuple(layer.active_adapters) for layer in layers}
    merged = {name for layer in layers for name in layer.merged_adapters}
    partly = any(merged & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    return ModelStatus(
        base_model_type=str((model.config.get("architectures") or ["other"])[0]),
        adapter_model_type="MixedModel" if model.mixed else _model_class(next(iter(types.values()))),
        peft_types=types,
        trainable_params=counted.trainable,
        total_params=counted.total,
        num_adapter_layers=len(layers),
        enabled=model.enabled,
        active_adapters=list(actives.pop()) if len(actives) == 1 else IRREGULAR,
        merged_adapters=IRREGULAR if partly else sorted(merged),
        requires_grad={name: grad for layer in layers for name, grad in layer.requires_grad.items()},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={name: where for layer in layers for name, where in layer.devices.items()},
    )


def _numbers(model: Adapted, adapter: Attached) -> int:
    """How many an adapter trains: what several modules share once."""
    once: dict[str, int] = {}
    method = adapter.config.method
    own, keys = 0, method.shared_keys(tuple(adapter.modules)) if isinstance(method, WeightMethod) else {}
    for name in adapter.modules:
        if name in adapter.following:
            continue
        for s in _specs(model, adapter.config.method_for(name), name):
            if s.trained and s.shared:
                once[keys[name][s.field]] = math.prod(s.shape)
            elif s.trained:
                own += math.prod(s.shape)
    return own + sum(once.values())


def _held(model: Adapted, adapter: Attached) -> int:
    """How many parameters of an adapter are not trained; what a method keeps beside is a buffer in HF, and not counted."""
    method = adapter.config.method
    held: frozenset[str] = method.held if isinstance(method, WeightMethod) else frozenset()
    return sum(
        math.prod(s.shape)
        for name in (adapter.modules if held else ())
        for s in _specs(model, adapter.config.method_for(name), name)
        if s.field in held
    )


def _status(model: Adapted, module: str, names: Iterable[str], kind: str, active: list[str]) -> LayerStatus:
    names = list(names)
    return LayerStatus(
        name=PREFIX + module,
        module_type=kind,
        enabled=model.enabled,
        active_adapters=active,
        merged_adapters=[] if kind == COPIES else [name for name in model.merged.names if name in names],
        requires_grad={name: model.adapters[name].trainable for name in names},
        available_adapters=sorted(names),
        devices={name: [_device(model, name, module)] for name in names},
    )


def _device(model: Adapted, name: str, module: str) -> str:
    adapter = model.adapters[name]
    values: Iterable[Array | None] = adapter.saved.values()
    if isinstance(adapter.modules, LazyModules):  # nothing is read for this
        values = (adapter.modules.like,)
    elif module in adapter.modules:
        values = adapter.modules[module].params
    return str(device_of(next(v for v in values if v is not None))).partition(":")[0]


def _specs(model: Adapted, method: WeightMethod[Any], module: str) -> tuple[ParamSpec, ...]:
    return method.spec(model.layer(module))


def _width(model: Adapted, name: str) -> int:
    block = model.modules()[name].block
    assert block is not None
    return block.hidden_size


def _layer_class(peft_type: str, kind: str) -> str:
    if peft_type == "LN_TUNING":  # whatever the layer
        return "ln_tuning.LNTuningLayer"
    name = LAYER_CLASSES.get(kind) or f"C{kind[1:]}"
    if peft_type == "ADALORA":
        return f"adalora.SVD{name}"
    return name if peft_type == "IA3" else f"{peft_type.lower()}.{name}"


def _model_class(peft_type: str) -> str:
    return MODEL_CLASSES.get(peft_type, f"{peft_type.title().replace('_', '')}Model")
