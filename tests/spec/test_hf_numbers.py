"""The numbers that the pages work out by hand, against HF PEFT run live: output, every gradient, merge and unmerge."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from peft_ref import METHODS, Adapter, forward, merge, unmerge  # noqa: E402
from peft_ref.files.adapter import AdapterModule, state_dict  # noqa: E402
from peft_ref.registry import CONFIG_NAMES  # noqa: E402
from tests.hf.peft_layers import own_facts, torch_layer  # noqa: E402
from tests.methods import facts  # noqa: E402
from tests.spec.pages import METHOD_PAGES, run  # noqa: E402

pytestmark = pytest.mark.hf


class Worked(NamedTuple):
    """The names that a block with a gradient leaves behind."""

    layer: Any
    W: Any
    b: Any
    adapters: list[Adapter]
    x: Any
    dy: Any
    grads: Any


def worked() -> list[Any]:
    """Every gradient worked out on a page, with the page's own values at that place."""
    found = []
    for name in METHODS.weights:
        for ran in run(METHOD_PAGES[name]):
            if "grads =" in ran.block.source:
                values = Worked(*(ran.names[field] for field in Worked._fields))
                if own_facts(values.adapters[0].method).compared:
                    continue
                found.append(pytest.param(values, id=f"{name}-line{ran.block.line}"))
    return found


def hf_model(w: Worked) -> Any:
    """HF PEFT's model of the example's one layer, in float64, with the example's adapter."""
    (adapter,) = w.adapters
    method: Any = adapter.method
    own = own_facts(method)
    config = dict(own.peft_options(method))
    if "is_feedforward" in {f.name for f in fields(method)}:
        config["feedforward_modules"] = ["linear"] if method.is_feedforward else []
    base = torch.nn.Sequential()
    base.add_module("linear", torch_layer(w.layer, bias=True).to(torch.float32 if own.made_in_float32 else torch.float64))
    for p, value in ((base.linear.weight, w.layer.unfold(w.W)), (base.linear.bias, w.b)):
        p.data = torch.tensor(value).to(p.dtype)
    made = getattr(peft, CONFIG_NAMES[method.peft_type])(target_modules=["linear"], **config)
    model = peft.get_peft_model(base, made, autocast_adapter_dtype=False).double()
    model.train(method.flag == "velora_config")  # which computes its gradient in training alone
    inner = model.base_model.model.linear.get_base_layer()
    inner.weight.data, inner.bias.data = torch.tensor(w.layer.unfold(w.W)), torch.tensor(w.b)  # after the start, which may cut the weight
    for spec in method.spec(w.layer):
        if not spec.saved and not spec.shared:  # beside the weight, in no file
            getattr(model.base_model.model.linear, spec.key)["default"] = torch.tensor(getattr(adapter.params, spec.field))
    tensors = {k: torch.tensor(v) for k, v in state_dict({"linear": AdapterModule(method, w.layer, adapter.params)}).items()}
    peft.set_peft_model_state_dict(model, tensors)
    own_facts(method).impose(model.base_model.model.linear, "default", method)
    assert all(torch.equal(v, tensors[k]) for k, v in peft.get_peft_model_state_dict(model).items())
    return model


def alike(theirs: Any, ours: Any, w: Worked) -> None:
    """To the bit; AdaLoRA's scale, RoAd's cosines and PEFT's Haar wavelet are no dyadic numbers, so there HF's roundings may show."""
    if w.adapters[0].method.peft_type in ("ADALORA", "ROAD", "WAVEFT"):
        np.testing.assert_allclose(theirs.detach(), ours, rtol=1e-13, atol=1e-13)
    else:
        assert theirs.tolist() == ours.tolist()


def test_every_page_has_a_gradient_to_compare() -> None:
    assert {p.id.partition("-")[0] for p in worked()} == {name for name in METHODS.weights if not facts(name).compared}


@pytest.mark.parametrize("w", worked())
def test_output_and_gradients_are_those_of_hf(w: Worked) -> None:
    model = hf_model(w)
    x = torch.tensor(w.x, requires_grad=True)
    y = model(x)
    y.backward(torch.tensor(w.dy))
    alike(y, forward(w.layer, w.W, w.b, w.adapters, w.x), w)
    alike(x.grad, w.grads.x, w)
    ours, shared = w.adapters[0].method.pack(w.layer, w.grads.params[0]), w.adapters[0].method.shared_keys(("linear",)).get("linear", {})
    # HF names a trained parameter "<key>.default", or "<key without .weight>.default.weight".
    grads = {n.split("linear.")[1].replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    theirs = {n: g for n, g in grads.items() if n != "ranknum"}  # ADALORA-Q6
    places = {place: s.key for s in w.adapters[0].method.spec(w.layer) if s.shared for place in [shared[s.field]]}
    theirs = {places.get(n, n if n in ours else n.removesuffix(".weight")): g for n, g in theirs.items()}
    ours = {key: gradient for key, gradient in ours.items() if key in theirs or np.any(gradient)}  # what is not read has none there
    assert theirs.keys() == ours.keys()
    for key, gradient in theirs.items():
        alike(gradient, ours[key], w)


@pytest.mark.parametrize("w", worked())
def test_merged_and_unmerged_weights_are_those_of_hf(w: Worked) -> None:
    model = hf_model(w)
    linear = model.base_model.model.linear
    model.merge_adapter()
    W, b = merge(w.layer, w.W, w.b, w.adapters)
    assert b is not None
    alike(linear.base_layer.weight, w.layer.unfold(W), w)
    alike(linear.base_layer.bias, b, w)
    if w.adapters[0].method.peft_type == "OSF":
        return  # OSF-Q2: there is no unmerging
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # HF warns that IA3's unmerge is inaccurate
        model.unmerge_adapter()
    ours = unmerge(w.layer, W, b, w.adapters, w.W, w.b)
    assert ours[1] is not None
    # IA3-Q1: HF divides by l + 1e-8, which at l = 1/2 is off by 2e-8.
    np.testing.assert_allclose(linear.base_layer.weight.detach(), w.layer.unfold(ours[0]), rtol=0, atol=5e-8 * np.max(np.abs(w.W)))
    np.testing.assert_allclose(linear.base_layer.bias.detach(), ours[1], rtol=0, atol=5e-8 * np.max(np.abs(w.b)))
