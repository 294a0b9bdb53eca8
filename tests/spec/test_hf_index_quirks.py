"""Every quirk of BEFT, C3A, SHiRA and FourierFT, seen in HF PEFT run live. One that a newer PEFT has lost fails, and leaves its page."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from torch import nn  # noqa: E402

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _float64_and_seed() -> Iterator[None]:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def adapted(layer: Any, *configs: Any) -> tuple[Any, Any]:
    """PEFT's model of one layer `l` with active adapters, and its tuner layer."""
    base = nn.Sequential()
    base.add_module("l", layer)
    made = peft.get_peft_model(base, configs[0], adapter_name="a0", autocast_adapter_dtype=False)
    for i, config in enumerate(configs[1:], start=1):
        made.add_adapter(f"a{i}", config, autocast_adapter_dtype=False)
    made.base_model.set_adapter([f"a{i}" for i in range(len(configs))])
    return made.eval(), made.base_model.model.l


def test_beft_q1_merging_stops_halfway_at_a_layer_without_a_bias() -> None:
    base = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False))
    made = peft.get_peft_model(base, peft.BeftConfig(target_modules=["0", "1"]))
    with pytest.raises(ValueError, match="no bias"):
        made.merge_adapter()
    assert [made.base_model.model[i].merged_adapters for i in (0, 1)] == [["default"], []]


def test_beft_q2_half_precision_rounds_the_output_twice() -> None:
    linear = nn.Linear(1, 1).to(torch.bfloat16)
    linear.weight.data[:], linear.bias.data[:] = 1.0, 2.0**-8
    made, layer = adapted(linear, peft.BeftConfig(target_modules=["l"]))
    layer.beft_bias["a0"].data[:] = 2.0**-8
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    apart = made(x).item()
    made.merge_adapter()
    assert (apart, made(x).item()) == (1.0, 1.0 + 2.0**-7)


def test_beft_q3_words_that_narrow_the_targets_are_dropped() -> None:
    words: dict[str, Any] = {"exclude_modules": ["l"], "layers_to_transform": [7]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = peft.PeftConfig.from_peft_type(peft_type="BEFT", target_modules=["l"], **words)
    assert all(any(word in str(w.message) for w in caught) for word in words)
    made, _ = adapted(nn.Linear(3, 4), config)
    assert made.targeted_module_names == ["l"]
