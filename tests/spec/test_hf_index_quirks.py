"""Every quirk of BEFT, C3A, SHiRA and FourierFT, seen in HF PEFT run live. One that a newer PEFT has lost fails, and leaves its page."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

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


def c3a(block: int, **more: Any) -> Any:
    return peft.C3AConfig(target_modules=["l"], block_size=block, **more)


def plain(n_in: int, out: int) -> Any:
    """A layer of zeros: what comes out is the adapters'."""
    linear = nn.Linear(n_in, out, bias=False)
    linear.weight.data[:] = 0
    return linear


def test_c3a_q1_the_gradient_of_x_is_not_the_transpose_from_blocks_of_three_on() -> None:
    made, layer = adapted(plain(3, 3), c3a(3))
    layer.c3a_kernel["a0"].data = torch.tensor([[[3.0, 6, 9]]])
    x = torch.zeros(3, 3, requires_grad=True)
    made(x).backward(torch.eye(3))
    block = torch.tensor([[1.0, 2, 3], [3, 1, 2], [2, 3, 1]])
    torch.testing.assert_close(made(torch.eye(3)).T, block, atol=1e-6, rtol=0)
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 2, 3], [2, 3, 1], [3, 1, 2]]), atol=1e-6, rtol=0)
    made, _ = adapted(plain(4, 4), c3a(2))
    x = torch.zeros(4, 4, requires_grad=True)
    made(x).backward(torch.eye(4))
    torch.testing.assert_close(x.grad, made(torch.eye(4)).T, atol=1e-6, rtol=0)


def test_c3a_q2_the_second_adapter_reads_what_the_first_one_added() -> None:
    made, layer = adapted(plain(4, 4), c3a(4), c3a(2))
    one, two = (layer.get_delta_weight(name) for name in ("a0", "a1"))
    torch.testing.assert_close(made(torch.eye(4)).T, one + two @ one, atol=1e-6, rtol=0)
    made.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, one + two, atol=1e-6, rtol=0)
    made, _ = adapted(plain(6, 9), c3a(3), c3a(3))
    with pytest.raises(RuntimeError, match="shape"):
        made(torch.eye(6))


def test_c3a_q3_a_float64_layer_gets_float32_numbers() -> None:
    made, layer = adapted(nn.Linear(6, 9), c3a(3))
    x = torch.randn(50, 6)
    right = (
        x @ (layer.base_layer.weight + torch.vstack([torch.hstack([circulant(k) for k in row]) for row in layer.c3a_kernel["a0"]]) / 6).T
    )
    apart = (made(x) - right - layer.base_layer.bias).abs().max()
    assert 1e-9 < apart < 1e-6


def circulant(kernel: Any) -> Any:
    return torch.stack([torch.roll(kernel, t) for t in range(len(kernel))])


def test_c3a_q4_the_default_targets_of_gpt2_are_refused() -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 13, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    with pytest.raises(TypeError, match="Conv1D"):
        peft.get_peft_model(model, peft.C3AConfig(block_size=4))


def test_c3a_q5_there_is_no_group_around_a_key_of_the_pattern() -> None:
    base = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(4, 4), "up": nn.Linear(4, 4)}), "up": nn.Linear(4, 4)})
    config = peft.C3AConfig(target_modules=["q", "up"], block_size=4, block_size_pattern={"q|up": 2})
    made = peft.get_peft_model(base, config).base_model.model
    assert [m.block_size["default"] for m in (made["a"]["q"], made["a"]["up"], made["up"])] == [2, 4, 2]


def shira(r: int, **more: Any) -> Any:
    return peft.ShiraConfig(target_modules=["l"], r=r, **more)


def test_shira_q1_layers_of_one_shape_have_the_same_places() -> None:
    base = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 7))
    made = peft.get_peft_model(base, peft.ShiraConfig(target_modules=["0", "1", "2"], r=1)).base_model.model
    places = [made[i].shira_indices["default"] for i in range(3)]
    assert torch.equal(places[0], places[2])
    assert not torch.equal(places[0], places[1])
    _, layer = adapted(nn.Linear(6, 7), shira(1), shira(1))
    assert torch.equal(layer.shira_indices["a0"], layer.shira_indices["a1"])


def test_shira_q2_at_a_place_that_comes_twice_both_numbers_are_added() -> None:
    made, layer = adapted(plain(3, 2), shira(1))
    layer.shira_indices["a0"][:] = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 2]])
    layer.shira_weight["a0"].data[:] = torch.arange(1.0, 6)
    made(torch.ones(1, 3)).backward(torch.tensor([[1.0, 0]]))
    assert made(torch.eye(3))[0].tolist() == [3.0, 3.0]
    assert layer.shira_weight["a0"].grad.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_shira_q3_hooks_of_the_frozen_layer_are_not_called() -> None:
    made, layer = adapted(nn.Linear(6, 7), shira(1))
    called: list[int] = []
    layer.base_layer.register_forward_hook(lambda *_: called.append(1))
    made(torch.ones(1, 6))
    assert not called
    with made.disable_adapter():
        made(torch.ones(1, 6))
    assert called == [1]


def test_shira_q4_the_default_targets_of_gpt2_are_refused() -> None:
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 13, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    with pytest.raises(TypeError, match="Conv1D"):
        peft.get_peft_model(model, peft.ShiraConfig(r=1))


def fourierft(**more: Any) -> Any:
    return peft.FourierFTConfig(target_modules=["l"], **{"n_frequency": 6, "scaling": 20.0, **more})


def test_fourierft_q1_spectrum_and_gradient_are_rounded_to_float32() -> None:
    made, layer = adapted(nn.Linear(5, 7), fourierft())
    with pytest.raises(RuntimeError, match="dtypes match"):  # torch's default dtype is float64 here
        made(torch.randn(3, 5))
    torch.set_default_dtype(torch.float32)
    spectrum = layer.fourierft_spectrum["a0"]
    spectrum.data = spectrum.data + 1e-12  # below what float32 can hold
    before = layer.get_delta_weight("a0")
    spectrum.data = spectrum.data.float().double()
    assert torch.equal(layer.get_delta_weight("a0"), before)
    made(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
    assert spectrum.grad.dtype == torch.float64
    assert torch.equal(spectrum.grad.float().double(), spectrum.grad)


def test_fourierft_q2_a_fresh_adapter_changes_the_layer() -> None:
    torch.set_default_dtype(torch.float32)
    _, layer = adapted(nn.Linear(5, 7), fourierft(scaling=150.0))
    assert layer.get_delta_weight("a0").abs().max() > 1
    _, layer = adapted(nn.Linear(5, 7), fourierft(init_weights=True))
    assert layer.get_delta_weight("a0").abs().max() == 0


def test_fourierft_q3_another_seed_makes_another_adapter_of_the_same_tensors() -> None:
    torch.set_default_dtype(torch.float32)
    made, one = adapted(nn.Linear(5, 7), fourierft())
    tensors = peft.get_peft_model_state_dict(made, adapter_name="a0")
    assert [k.rpartition(".")[2] for k in tensors] == ["fourierft_spectrum"]
    other_model, other = adapted(nn.Linear(5, 7), fourierft(random_loc_seed=778))
    result = peft.set_peft_model_state_dict(other_model, tensors, adapter_name="a0")
    assert result.unexpected_keys == []
    assert (one.get_delta_weight("a0") - other.get_delta_weight("a0")).abs().max() > 0.1
