"""MiSS's quirks in spec/methods/miss.md, miss_mini.md and miss_bat.md, each against HF PEFT run live."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from tests.spec.hf_made import disagreement, keys, model, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


def miss(**more: Any) -> Any:
    return peft.MissConfig(target_modules=["l"], **{"r": 2, **more})


def x(n: int = 4) -> Any:
    return torch.randn(3, n, dtype=torch.float64)


def test_miss_q1_the_first_adapter_decides_for_the_layer() -> None:
    made = model(nn.Linear(4, 2), miss(), miss(init_weights="mini", mini_r=2))  # of the same shape: read as plain, which is the same here
    assert wrapped(made).miss_fn is True
    with pytest.raises(RuntimeError):
        model(nn.Linear(4, 4), miss(), miss(init_weights="mini", mini_r=2))(x())
    made = model(nn.Linear(4, 4), miss(init_weights="mini", mini_r=2), miss(mini_r=2))
    with pytest.raises(RuntimeError):
        made(x())
    made = model(nn.Linear(4, 2), miss(), miss(init_weights="bat"))  # one block (1, 2, 2): taken for two axes
    assert keys(made, "a1") == {"miss_block": (1, 2, 2)}
    with pytest.raises((RuntimeError, IndexError)):
        made.merge_adapter()


def test_miss_q2_another_text_is_true() -> None:
    made = model(nn.Linear(4, 2), miss(init_weights="magic"))
    assert keys(made) == {"miss_block": (2, 2)}
    assert disagreement(made, x()) < 1e-12


def test_miss_q3_all_linear_finds_what_miss_refuses() -> None:
    base = nn.Sequential()
    base.add_module("l", Conv1D(4, 3))
    with pytest.raises(TypeError, match="supported"):
        peft.get_peft_model(base, miss())


def test_miss_q4_the_adapter_cannot_be_scaled() -> None:
    made, given = model(nn.Linear(4, 2), miss()), x()
    before = made(given)
    with pytest.warns(UserWarning, match="not supported"):
        wrapped(made).scale_layer(2.0)
    assert torch.equal(made(given), before)


def test_missmini_q1_the_error_shows_the_name_of_the_number() -> None:
    with pytest.raises(ValueError, match=r"\{self.out_features\}"):
        model(nn.Linear(4, 6), miss(init_weights="mini", mini_r=4))


def test_missmini_q2_zero_is_a_division_by_zero() -> None:
    with pytest.raises(ZeroDivisionError):
        model(nn.Linear(4, 6), miss(init_weights="mini", mini_r=0))


def test_missbat_q1_unmerge_inverts_in_float32() -> None:
    made = model(nn.Linear(4, 6), miss(init_weights="bat"))
    before = wrapped(made).base_layer.weight.detach().clone()
    made.merge_adapter()
    made.unmerge_adapter()
    away = float((wrapped(made).base_layer.weight - before).abs().max())
    assert 1e-9 < away < 1e-4


def test_missbat_q2_dropout_is_not_called() -> None:
    made, given = model(nn.Linear(4, 6), miss(init_weights="bat", miss_dropout=0.9)).train(), x()
    assert torch.equal(made(given), made.eval()(given))
    plain = model(nn.Linear(4, 6), miss(miss_dropout=0.9)).train()
    assert not torch.equal(plain(given), plain.eval()(given))


def test_missbat_q3_a_random_start_is_a_plain_one() -> None:
    assert keys(model(nn.Linear(4, 6), miss(init_weights=False))) == {"miss_block": (2, 6)}
    assert keys(model(nn.Linear(4, 6), miss(init_weights="bat"))) == {"miss_block": (3, 2, 2)}
