"""GraLoRA's quirks in spec/methods/gralora.md, each against HF PEFT run live."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

from tests.spec.hf_made import model, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


def gralora(**more: Any) -> Any:
    return peft.GraloraConfig(target_modules=["l"], **{"r": 4, "alpha": 6, **more})


def x(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("shape", "taken"), [((4,), False), ((2, 4), True), ((2, 3, 4), True), ((2, 3, 2, 4), False)])
def test_gralora_q1_only_two_and_three_axes_are_taken(shape: tuple[int, ...], taken: bool) -> None:
    made = model(nn.Linear(4, 6), gralora())
    if taken:
        assert made(x(*shape)).shape == (*shape[:-1], 6)
    else:
        with pytest.raises((ValueError, RuntimeError)):
            made(x(*shape))


def test_gralora_q2_the_plain_lora_has_a_mask_of_its_own() -> None:
    for hybrid_r, calls in ((0, 1), (2, 2)):
        made = model(nn.Linear(4, 6), gralora(hybrid_r=hybrid_r, gralora_dropout=0.5)).train()
        seen: list[Any] = []
        wrapped(made).gralora_dropout["a0"].register_forward_hook(lambda module, given, out, seen=seen: seen.append(out))
        made(x(5, 4))
        assert len(seen) == calls
        assert calls == 1 or not torch.equal(seen[0].reshape(-1), seen[1].reshape(-1))


def test_gralora_q3_it_adds_into_the_frozen_layers_output() -> None:
    made, kept = model(nn.Linear(4, 6), gralora()), []
    wrapped(made).base_layer.register_forward_hook(lambda module, given, out: kept.append((out, out.detach().clone())))
    with torch.no_grad():
        y = made(x(2, 4))
    after, before = kept[0]
    assert torch.equal(after, y)
    assert not torch.equal(after, before)


def test_gralora_q4_exclude_modules_is_dropped() -> None:
    config = peft.PeftConfig.from_peft_type(peft_type="GRALORA", exclude_modules=["l"], target_modules=["l"])
    assert not hasattr(config, "exclude_modules")
    with pytest.raises(TypeError, match="exclude_modules"):
        peft.GraloraConfig(exclude_modules=["l"])
