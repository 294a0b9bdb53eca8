"""One torch layer under PEFT, beside the same layer here: what the differential tests compare."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from transformers.pytorch_utils import Conv1D

from peft_ref.contracts import WeightMethod
from peft_ref.layers import Conv, Embedding, Layer, Linear
from peft_ref.methods import METHODS
from peft_ref.norms import Norm
from peft_ref.stack import Adapter
from tests.methods import facts
from tests.methods.facts import Facts

LAYERS: dict[str, Layer] = {
    "linear": Linear(in_features=5, out_features=7),
    "linear-even": Linear(in_features=5, out_features=12),
    "transposed_linear": Linear(in_features=5, out_features=7, transposed=True),
    "embedding": Embedding(num_embeddings=9, embedding_dim=6),
    "conv1d": Conv(in_channels=3, out_channels=5, kernel_size=(3,), stride=(2,), padding=(1,)),
    "conv2d": Conv(in_channels=3, out_channels=5, kernel_size=(2, 3), stride=(2, 1), padding=(1, 2)),
    "conv2d-square": Conv(in_channels=3, out_channels=5, kernel_size=(2, 2), stride=(2, 2), padding=(1, 1)),
    "conv2d-pointwise": Conv(in_channels=6, out_channels=5, kernel_size=(1, 1), stride=(2, 1), padding=(1, 2)),
    "conv2d-groups": Conv(in_channels=4, out_channels=6, kernel_size=(2, 3), stride=(1, 2), padding=(0, 1), groups=2),
    "conv2d-dilation": Conv(in_channels=3, out_channels=5, kernel_size=(2, 3), padding=(2, 1), dilation=(3, 2)),
    "linear-thirds": Linear(in_features=6, out_features=9),
    "linear-square": Linear(in_features=8, out_features=8),
    "linear-both": Linear(in_features=8, out_features=12),
    "transposed-both": Linear(in_features=8, out_features=12, transposed=True),
    "conv1d-both": Conv(in_channels=6, out_channels=10, kernel_size=(3,), padding=(1,)),
    "conv2d-both": Conv(in_channels=6, out_channels=10, kernel_size=(2, 3), stride=(2, 1)),
    "conv3d": Conv(in_channels=2, out_channels=3, kernel_size=(2, 3, 1), padding=(1, 1, 1)),
    "layer-norm": Norm(features=5, eps=1e-3),
    "rms-norm": Norm(features=5, eps=1e-3, centred=False, bias=False),
}
INPUTS = {
    "linear": (2, 3, 5),
    "linear-even": (2, 3, 5),
    "transposed_linear": (2, 3, 5),
    "embedding": (2, 4),
    "conv1d": (2, 3, 8),
    "conv2d": (2, 3, 7, 6),
    "conv2d-square": (2, 3, 7, 6),
    "conv2d-pointwise": (2, 6, 7, 4),
    "conv2d-groups": (2, 4, 5, 6),
    "conv2d-dilation": (2, 3, 8, 7),
    "linear-thirds": (2, 3, 6),
    "linear-square": (5, 8),
    "linear-both": (2, 3, 8),
    "transposed-both": (2, 3, 8),
    "conv1d-both": (2, 6, 5),
    "conv2d-both": (2, 6, 4, 5),
    "conv3d": (2, 2, 4, 3, 5),
    "layer-norm": (2, 3, 5),
    "rms-norm": (2, 3, 5),
}


FLOAT = torch.Tensor.float


class Pair(NamedTuple):
    """A PEFT model around one layer, and that layer with its adapters here."""

    model: Any
    tuner: Any  # PEFT's layer
    layer: Layer
    W: np.ndarray[Any, Any]
    b: np.ndarray[Any, Any] | None
    adapters: list[Adapter]
    parameters: list[dict[str, Any]]  # per adapter: torch parameter by checkpoint key


def own_facts(method: WeightMethod[Any]) -> Facts:
    return next(facts(name) for name, cls in METHODS.weights.items() if cls is type(method))


def torch_layer(layer: Layer, bias: bool) -> torch.nn.Module:
    if isinstance(layer, Embedding):
        return torch.nn.Embedding(layer.num_embeddings, layer.embedding_dim)
    if isinstance(layer, Linear):
        return Conv1D(layer.out_features, layer.in_features) if layer.transposed else torch.nn.Linear(*layer.shape[::-1], bias=bias)
    if isinstance(layer, Norm):
        return torch.nn.LayerNorm(layer.features, layer.eps, bias=bias) if layer.centred else torch.nn.RMSNorm(layer.features, layer.eps)
    assert isinstance(layer, Conv)
    conv = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(layer.kernel_size) - 1]
    geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    return conv(layer.in_channels, layer.out_channels, layer.kernel_size, bias=bias, **geometry)


def pair(
    layer: Layer,
    method: WeightMethod[Any],
    configs: Sequence[peft.PeftConfig],
    rng: np.random.Generator,
    bias: bool = True,
    draw: Mapping[str, Any] | None = None,
) -> Pair:
    """Every adapter's numbers random, the same on both sides, all adapters active in order."""

    wide = own_facts(method).beside(method)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.target = torch_layer(layer, bias)
            if wide is not None:
                self.wide = torch_layer(wide, bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.target(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if own_facts(method).made_in_float32 else torch.float64)
        widened = torch.Tensor.float
        if own_facts(method).made_in_float32:
            torch.Tensor.float = FLOAT  # type: ignore[method-assign]
        try:
            model = peft.get_peft_model(Model(), configs[0], adapter_name="a0")
            for n, config in enumerate(configs[1:], start=1):
                model.add_adapter(f"a{n}", config)
        finally:
            torch.set_default_dtype(before)
            torch.Tensor.float = widened  # type: ignore[method-assign]
    model.double()
    layer = layer.with_bias(getattr(model.base_model.model.target.base_layer, "bias", None) is not None)
    names = [f"a{n}" for n in range(len(configs))]
    model.base_model.set_adapter(names)
    tuner = model.base_model.model.target
    own_facts(method).settle(tuner)
    adapters, parameters = [], []
    common: dict[str, Any] = {}  # of several adapters too: what is not trained PEFT's later ones take over from the first
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT takes a convolution's one-dimensional lora_B.bias for a broken shard
            saved = peft.get_peft_model_state_dict(model, adapter_name=name)
        tensors, own = {}, {}
        method = own_facts(method).as_made_by(tuner, name, method)
        for spec in method.spec(layer):
            place = method.shared_keys(("target",))["target"][spec.field] if spec.shared else f"model.target.{spec.key}"
            if spec.saved:
                assert tuple(saved[f"base_model.{place}"].shape) == spec.stored_shape
                if not spec.trained and not saved[f"base_model.{place}"].is_floating_point():
                    tensors[spec.key] = saved[f"base_model.{place}"].numpy()  # both sides made it alike
                    continue
            parameter = _parameter(model, place, name)
            values = own_facts(method).numbers(spec.field, rng.normal(size=spec.stored_shape))
            if spec.shared:
                values = common.setdefault(spec.key, values)
            if parameter.dtype.is_floating_point:
                parameter.data = torch.tensor(values).reshape(parameter.shape)
                parameter.requires_grad_(spec.trained)
            else:
                values = parameter.numpy().copy()
            tensors[spec.key], own[spec.key] = values, parameter
        assert len([key for key in saved if ".wide." not in key]) == sum(1 + s.repeated for s in method.spec(layer) if s.saved)
        adapters.append(Adapter(method, method.unpack(layer, tensors)))
        parameters.append(own)
    base = tuner.base_layer
    weight = base.weight.detach().numpy().copy()
    has_bias = getattr(base, "bias", None) is not None
    return Pair(model, tuner, layer, layer.fold(weight), base.bias.detach().numpy().copy() if has_bias else None, adapters, parameters)


def _parameter(model: Any, place: str, adapter: str) -> Any:
    """The torch parameter or buffer behind a file's key: PEFT puts the adapter's name among its words, at times a `weight` last."""
    for name, parameter in (*model.named_parameters(), *model.named_buffers(remove_duplicate=False)):
        own = ".".join(word for word in name.split(".") if word != adapter)
        at = {f"base_model.{place}", f"base_model.model.target.{place}"}  # what is shared is the layers' too
        if (own in at or own.removesuffix(".weight") in at) and f".{adapter}" in name:
            return parameter
    raise KeyError(place)
