"""C3A beside HF PEFT, whose float32 is taken for float64 here: what is right there is equal, what is not is the judge's dialect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_ref import stack  # noqa: E402
from peft_ref.check.case import Case, CaseAdapter, config_of  # noqa: E402
from peft_ref.check.mistakes import SUITES  # noqa: E402
from peft_ref.errors import UnsupportedLayerError  # noqa: E402
from peft_ref.methods import C3A  # noqa: E402
from tests.hf.peft_layers import LAYERS, Pair, pair  # noqa: E402
from tests.hf.test_layers import close  # noqa: E402

pytestmark = pytest.mark.hf
BLOCKS = {"linear": 1, "linear-thirds": 3, "linear-square": 4}
REPLAYS = {m.name: m.replay for m in SUITES["c3a"].mistakes}


class Wide:
    """torch, with float64 in place of float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.c3a.layer.torch", Wide())


def made(layer_name: str, adapters: int, bias: bool = True) -> tuple[Pair, Case]:
    """Both sides, and the question to them as a case."""
    layer, method, rng = LAYERS[layer_name], C3A(block_size=BLOCKS[layer_name]), np.random.default_rng(3)
    configs = [peft.C3AConfig(target_modules=["target"], block_size=method.block_size) for _ in range(adapters)]
    p = pair(layer, method, configs, rng, bias)
    case = Case(
        id="c3a",
        method="c3a",
        operation="forward",
        clause="",
        layer=layer,
        weight=layer.unfold(p.W),
        bias=p.b,
        adapters=tuple(CaseAdapter(config=config_of(method), tensors=method.pack(layer, a.params)) for a in p.adapters),
        x=rng.normal(size=(2, 3, layer.shape[1])),
        dy=rng.normal(size=(2, 3, layer.shape[0])),
    )
    return p, case


def theirs(p: Pair, case: Case) -> tuple[Any, dict[str, Any]]:
    x = torch.tensor(case.x, requires_grad=True)
    y = p.model(x)
    y.backward(torch.tensor(case.dy))
    return y.detach().numpy(), {
        "x": x.grad.numpy(),
        **{f"{i}.c3a_kernel": own["c3a_kernel"].grad.numpy() for i, own in enumerate(p.parameters)},
    }


def asked(name: str, case: Case, operation: str) -> dict[str, Any]:
    from dataclasses import replace

    answer = REPLAYS[name](replace(case, operation=operation))
    assert answer is not None
    return answer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_name", BLOCKS)
def test_output_and_kernel_gradient_equal_pefts_and_the_input_gradient_is_its_dialect(layer_name: str, bias: bool) -> None:
    p, case = made(layer_name, 1, bias)
    y, grads = theirs(p, case)
    close(stack.forward(p.layer, p.W, p.b, p.adapters, case.x), y)
    ours = stack.vjp(p.layer, p.W, p.b, p.adapters, case.x, case.dy)
    close(ours.params[0].K, grads["0.c3a_kernel"])
    for name, value in asked("c3a-input-gradient", case, "backward").items():
        close(value, grads[name])
    apart = np.max(np.abs(ours.x - grads["x"]))
    assert (apart > 0.1) == (BLOCKS[layer_name] > 2)


def test_several_adapters_are_chained_as_the_dialects_say() -> None:
    p, case = made("linear-square", 2)
    y, grads = theirs(p, case)
    close(asked("c3a-chained", case, "forward")["y"], y)
    for name, value in asked("c3a-input-gradient", case, "backward").items():
        close(value, grads[name])
    p, case = made("linear-thirds", 2)
    with pytest.raises(RuntimeError):
        theirs(p, case)


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("layer_name", BLOCKS)
def test_merge_equals_pefts_and_unmerge_takes_it_back(layer_name: str, adapters: int) -> None:
    p, _ = made(layer_name, adapters)
    W, b = stack.merge(p.layer, p.W, p.b, p.adapters)
    p.tuner.merge()
    close(p.layer.unfold(W), p.tuner.base_layer.weight.detach().numpy())
    close(stack.unmerge(p.layer, W, b, p.adapters, p.W)[0], p.W)
    p.tuner.unmerge()
    close(p.W, p.tuner.base_layer.weight.detach().numpy())


@pytest.mark.parametrize(
    ("layer_name", "block"), [("linear", 2), ("linear-thirds", 4), *((n, 1) for n in LAYERS if LAYERS[n].kind != "linear")]
)
def test_a_layer_we_refuse_peft_refuses_too(layer_name: str, block: int) -> None:
    method, layer = C3A(block_size=block), LAYERS[layer_name]
    with pytest.raises(UnsupportedLayerError, match=r"block_size=|not supported"):
        method.check_layer(layer)
    with pytest.raises((ValueError, TypeError)):
        pair(layer, method, [peft.C3AConfig(target_modules=["target"], block_size=block)], np.random.default_rng(0))
