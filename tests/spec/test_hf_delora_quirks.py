"""DeLoRA's quirks, seen in HF PEFT run live."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

from peft_ref import Adapter, forward, vjp  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods.delora import DeLoRA  # noqa: E402
from tests.spec.hf_made import keys, model, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


def delora(**options: Any) -> Any:
    return peft.DeloraConfig(target_modules=["l"], **{"r": 3, **options})


def test_delora_q1_the_norms_are_those_of_columns_and_are_saved() -> None:
    made = model(nn.Linear(6, 5), delora())
    assert keys(made) == {"delora_A": (3, 6), "delora_B": (5, 3), "delora_lambda": (1,), "delora_w_norm": (6,)}
    want = wrapped(made).base_layer.weight.norm(dim=0)
    assert torch.equal(wrapped(made).delora_w_norm["a0"], want)


def test_delora_q2_the_norms_are_those_of_a_merged_weight() -> None:
    made = model(nn.Linear(6, 5), delora())
    before = wrapped(made).base_layer.weight.norm(dim=0).clone()
    made.merge_adapter()
    merged = wrapped(made).base_layer.weight.norm(dim=0).clone()
    made.add_adapter("a1", delora(), autocast_adapter_dtype=False)  # which unmerges, when it is done
    measured = wrapped(made).delora_w_norm["a1"]
    assert torch.equal(measured, merged)
    assert not torch.allclose(measured, before)


def test_delora_q3_on_the_meta_device_the_norms_are_one() -> None:
    with torch.device("meta"):
        layer = nn.Linear(6, 5)
    base = nn.Sequential()
    base.add_module("l", layer)
    made = peft.get_peft_model(base, delora(), low_cpu_mem_usage=True)
    w = wrapped(made).delora_w_norm["default"]
    assert w.is_meta
    assert tuple(w.shape) == (6,)


def test_delora_q4_module_dropout_drops_numbers() -> None:
    made = model(nn.Linear(6, 5), delora(module_dropout=0.5)).train()
    dropped = wrapped(made).delora_dropout["a0"](torch.ones(4, 6))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("short", ["A", "B", "zero B"])
def test_lengths_below_1e_4_are_held_as_pefts_and_so_are_their_gradients(short: str) -> None:
    made = model(nn.Linear(6, 5), delora())
    theirs, method, layer = wrapped(made), DeLoRA(r=3), Linear(in_features=6, out_features=5)
    A, B, length, w = (p["a0"] for p in (theirs.delora_A, theirs.delora_B, theirs.delora_lambda, theirs.delora_w_norm))
    if short == "A":
        A.data[1] = A.data[1] * 1e-5
    else:
        B.data[:, 2] = B.data[:, 2] * (1e-5 if short == "B" else 0.0)
    tensors = {"delora_A": A, "delora_B": B, "delora_lambda": length, "delora_w_norm": w}
    ours = [Adapter(method, method.unpack(layer, {key: v.detach().numpy().copy() for key, v in tensors.items()}))]
    W, b = theirs.base_layer.weight.detach().numpy(), theirs.base_layer.bias.detach().numpy()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = made(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    np.testing.assert_allclose(forward(layer, W, b, ours, x.detach().numpy()), y.detach(), rtol=1e-12, atol=1e-12)
    grads = vjp(layer, W, b, ours, x.detach().numpy(), dy.numpy())
    np.testing.assert_allclose(grads.x, x.grad, rtol=1e-12, atol=1e-12)
    for key, value in method.pack(layer, grads.params[0]).items():
        want = tensors[key].grad
        np.testing.assert_allclose(value, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()), err_msg=key)
