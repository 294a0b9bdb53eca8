"""The quirks of AdaMSS, seen in HF PEFT run live. That K - 1 subspaces stay is in tests/hf/test_adamss_trace.py too, step by step."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("sklearn")

from torch import nn  # noqa: E402

from peft_ref.errors import UnsupportedLayerError  # noqa: E402
from peft_ref.layers import Linear  # noqa: E402
from peft_ref.methods import AdaMSS  # noqa: E402
from tests.spec.hf_made import keys, model, wrapped  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


def config(**more: Any) -> Any:
    return peft.AdamssConfig(**{"r": 4, "num_subspaces": 3, "target_modules": ["l"], **more})


def test_adamss_q1_where_one_is_to_stay_none_does() -> None:
    made = model(nn.Linear(6, 5), config(use_asa=True, asa_target_subspaces=1, init_warmup=0, final_warmup=2, mask_interval=2))
    for step in (1, 2):
        made(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
        made.base_model.update_and_allocate(step)
    assert not any(A.requires_grad for A in wrapped(made).adamss_A["a0"])


def test_adamss_q2_onto_another_weight_it_loads_and_the_rows_go_elsewhere() -> None:
    torch.manual_seed(3)
    made, other = (model(nn.Linear(6, 9), config()) for _ in range(2))
    one, two = wrapped(made), wrapped(other)
    assert not any("scatter" in key or "seg" in key for key in keys(made))
    assert one.scatter_index["a0"].tolist() != two.scatter_index["a0"].tolist()
    tensors = peft.get_peft_model_state_dict(made, adapter_name="a0")
    result = peft.set_peft_model_state_dict(other, tensors, adapter_name="a0")
    assert not result.unexpected_keys
    assert [B.shape for B in two.adamss_B["a0"]] == [B.shape for B in one.adamss_B["a0"]]
    moved = one.get_delta_weight("a0"), two.get_delta_weight("a0")
    assert not torch.allclose(*moved)
    assert torch.allclose(moved[0][one.scatter_index["a0"]], moved[1][two.scatter_index["a0"]])


def test_adamss_q3_a_subspace_of_a_higher_rank_than_there_are_directions_does_not_fit() -> None:
    made = model(nn.Linear(6, 9), config(r=2, num_subspaces=1, subspace_rank=3))
    assert (wrapped(made).adamss_A["a0"][0].shape[0], wrapped(made).adamss_B["a0"][0].shape[1]) == (2, 3)
    with pytest.raises(RuntimeError):
        made(torch.randn(3, 6, dtype=torch.float64))
    with pytest.raises(UnsupportedLayerError, match="rank 3 in only 2 directions"):
        AdaMSS(r=2, num_subspaces=1, subspace_rank=3).check_layer(Linear(in_features=6, out_features=9))


def test_adamss_q4_a_second_adapter_is_not_counted() -> None:
    made = model(nn.Linear(6, 9), config(use_asa=True, num_subspaces=2), config(use_asa=True, num_subspaces=4))
    assert made.base_model._asa_total_subspaces == {"a0": 2}
    made.base_model.set_adapter("a1")
    asked = made.peft_config["a1"]
    assert made.base_model._get_asa_total_subspaces() == 2
    assert made.base_model._schedule_threshold(asked.init_warmup, asked) == 2


def test_adamss_q5_a_single_vector_raises() -> None:
    made = model(nn.Linear(6, 9), config())
    made(torch.randn(1, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="expand"):
        made(torch.randn(6, dtype=torch.float64))
