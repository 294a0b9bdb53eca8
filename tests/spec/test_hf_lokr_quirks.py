"""LoKr's quirks in spec/methods/lokr.md, each against HF PEFT run live."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402

from tests.spec.hf_made import disagreement, keys, model, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


def lokr(**more: Any) -> Any:
    return peft.LoKrConfig(target_modules=["l"], **{"r": 8, "alpha": 8, **more})


def test_lokr_q1_on_a_1d_convolution_a_full_w2_is_paired_wrongly() -> None:
    made = model(nn.Conv1d(6, 10, 3), lokr())
    layer = wrapped(made)
    w1, w2, delta = layer.lokr_w1["a0"], layer.lokr_w2["a0"], layer.get_delta_weight("a0")
    true = torch.kron(w1[:, :, None], w2)
    assert delta.shape == true.shape
    assert float((delta - true).abs().max()) > 0.1
    crossed = torch.einsum("ac,bdk->badck", w1, w2).reshape(delta.shape)
    assert torch.allclose(delta, crossed, atol=1e-12, rtol=0)
    assert disagreement(made, torch.randn(2, 6, 5, dtype=torch.float64)) < 1e-11
    flat = wrapped(model(nn.Conv2d(6, 10, (3, 1)), lokr()))
    assert torch.allclose(flat.get_delta_weight("a0"), torch.kron(flat.lokr_w1["a0"][:, :, None, None], flat.lokr_w2["a0"]), atol=1e-12)


def test_lokr_q2_rank_dropout_divides_only_when_told() -> None:
    torch.manual_seed(3)
    for scaled in (False, True):
        made = model(nn.Linear(4, 40), lokr(rank_dropout=0.5, rank_dropout_scale=scaled))
        layer = wrapped(made)
        factor = layer.get_delta_weight("a0", apply_rank_dropout=True) / layer.get_delta_weight("a0")
        rows = factor[:, 0].detach()
        assert {round(v, 6) for v in rows.tolist()} == {0.0, round(40 / float((rows > 0).sum()), 6) if scaled else 1.0}
    made = model(nn.Linear(4, 4), lokr(rank_dropout=0.9999, rank_dropout_scale=True)).train()
    assert bool(made(torch.randn(2, 4, dtype=torch.float64)).isnan().all())


def test_lokr_q3_a_core_of_rank_one_raises() -> None:
    x = torch.randn(2, 24, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="view"):
        model(nn.Conv1d(24, 40, 3), lokr(r=1, use_effective_conv2d=True))(x)
    assert model(nn.Conv1d(24, 40, 3), lokr(r=2, use_effective_conv2d=True))(x).shape == (2, 40, 3)


def test_lokr_q4_a_factor_that_divides_is_taken_as_it_is_and_another_is_a_limit() -> None:
    shapes = {f: keys(model(nn.Linear(24, 40), lokr(decompose_factor=f)))["lokr_w1"] for f in (-1, 8, 7, 3)}
    assert shapes == {-1: (5, 4), 8: (8, 8), 7: (5, 4), 3: (2, 3)}


def test_lokr_q5_another_text_is_true() -> None:
    base = nn.Sequential()
    base.add_module("l", nn.Linear(4, 6))
    made = peft.get_peft_model(base, lokr(init_weights="magic"), adapter_name="a0")
    assert not bool(wrapped(made).lokr_w1["a0"].any())


def test_lokr_q6_padding_mode_is_not_followed() -> None:
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    assert disagreement(model(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), lokr()), x) > 1
    assert disagreement(model(nn.Conv2d(4, 6, 3, padding=1), lokr()), x) < 1e-11
